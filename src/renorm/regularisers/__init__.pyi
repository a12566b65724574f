# written by `make stubs`; a test compares it with the folder
from renorm.regularisers.bss import BSS as BSS
from renorm.regularisers.co_tuning import CoTuning as CoTuning
from renorm.regularisers.delta import Delta as Delta
from renorm.regularisers.l2_sp import L2SP as L2SP
from renorm.regularisers.shrink import Shrink as Shrink
from renorm.regularisers.stochnorm import StochNorm as StochNorm
