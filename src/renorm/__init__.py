"""renorm makes pretrained networks work on new data by getting their normalisation layers right."""

from renorm.affine import Affine as Affine
from renorm.doctor import Diagnosis as Diagnosis
from renorm.doctor import diagnose as diagnose
from renorm.errors import BatchError as BatchError
from renorm.errors import NoBatchNorm as NoBatchNorm
from renorm.errors import RenormError as RenormError
from renorm.evaluate import Score as Score
from renorm.evaluate import evaluate as evaluate
from renorm.moments import Moments as Moments
from renorm.moments import Observed as Observed
from renorm.observe import observe as observe
from renorm.profile import Profile as Profile
from renorm.profile import profile as profile
from renorm.recalibrate import Adaptation as Adaptation
from renorm.recalibrate import recalibrate_ as recalibrate_
from renorm.shift import Shift as Shift
from renorm.sites import Site as Site
from renorm.sites import find_sites as find_sites
from renorm.verify import Gap as Gap
from renorm.verify import verify as verify

__version__ = "0.1.0"
__all__ = [
    "Adaptation",
    "Affine",
    "BatchError",
    "Diagnosis",
    "Gap",
    "Moments",
    "NoBatchNorm",
    "Observed",
    "Profile",
    "RenormError",
    "Score",
    "Shift",
    "Site",
    "diagnose",
    "evaluate",
    "find_sites",
    "observe",
    "profile",
    "recalibrate_",
    "verify",
]
