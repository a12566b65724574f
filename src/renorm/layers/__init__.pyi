# written by `make stubs`; a test compares it with the folder
from renorm.layers.batch import BatchNorm as BatchNorm
from renorm.layers.batch import BNLayer as BNLayer
from renorm.layers.batch_renorm import BatchRenorm as BatchRenorm
from renorm.layers.blended import Blended as Blended
from renorm.layers.frozen import Frozen as Frozen
from renorm.layers.ghost import Ghost as Ghost
from renorm.layers.group import Group as Group
from renorm.layers.instance import Instance as Instance
from renorm.layers.instance_aware import InstanceAware as InstanceAware
from renorm.layers.layer import LayerNorm as LayerNorm
from renorm.layers.per_domain import PerDomain as PerDomain
from renorm.layers.per_domain import WithDomains as WithDomains
from renorm.layers.shrink import Shrink as Shrink
from renorm.layers.split import Split as Split
from renorm.layers.stochastic import Stochastic as Stochastic
from renorm.layers.sync import Sync as Sync
from renorm.layers.transferable import Transferable as Transferable
