# written by `make stubs`; a test compares it with the folder
from renorm.methods.equal_mix import EqualMix as EqualMix
from renorm.methods.pooled import Pooled as Pooled
