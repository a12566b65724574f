# written by `make stubs`; a test compares it with the folder
from renorm.online.batch import Batch as Batch
from renorm.online.eata import Eata as Eata
from renorm.online.ema import Ema as Ema
from renorm.online.hybrid import Hybrid as Hybrid
from renorm.online.lame import Lame as Lame
from renorm.online.prior import Prior as Prior
from renorm.online.rdumb import RDumb as RDumb
from renorm.online.roid import Roid as Roid
from renorm.online.shrink import Shrink as Shrink
from renorm.online.source import Source as Source
from renorm.online.tbr import Tbr as Tbr
from renorm.online.tent import Tent as Tent
from renorm.online.unmix import Unmix as Unmix
