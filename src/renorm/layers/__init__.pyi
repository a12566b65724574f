# written by `make stubs`; a test compares it with the folder
from renorm.layers.batch import BatchNorm as BatchNorm
from renorm.layers.batch import BNLayer as BNLayer
from renorm.layers.batch_renorm import BatchRenorm as BatchRenorm
from renorm.layers.blended import Blended as Blended
from renorm.layers.frozen import Frozen as Frozen
from renorm.layers.per_domain import PerDomain as PerDomain
from renorm.layers.per_domain import WithDomains as WithDomains
from renorm.layers.shrink import Shrink as Shrink
from renorm.layers.stochastic import Stochastic as Stochastic
