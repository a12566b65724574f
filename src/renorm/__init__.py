"""renorm makes pretrained networks work on new data by getting their normalisation layers right."""

from renorm.adapt import adapt_ as adapt_
from renorm.adapters import Adapter as Adapter
from renorm.adapters import load_adapter_ as load_adapter_
from renorm.adapters import save_adapter as save_adapter
from renorm.advise import Advice as Advice
from renorm.advise import advise as advise
from renorm.affine import Affine as Affine
from renorm.cite import cite as cite
from renorm.columns import Columns as Columns
from renorm.doctor import Diagnosis as Diagnosis
from renorm.doctor import diagnose as diagnose
from renorm.doctor import diagnose_file as diagnose_file
from renorm.errors import BatchError as BatchError
from renorm.errors import NoBatchNorm as NoBatchNorm
from renorm.errors import RenormError as RenormError
from renorm.evaluate import Score as Score
from renorm.evaluate import evaluate as evaluate
from renorm.events import FineTuned as FineTuned
from renorm.export import Exported as Exported
from renorm.export import export as export
from renorm.finetune import finetune_ as finetune_
from renorm.fold import Folded as Folded
from renorm.fold import fold as fold
from renorm.fold import load_folded_ as load_folded_
from renorm.freeze import Freeze as Freeze
from renorm.freeze import freeze_ as freeze_
from renorm.freeze import frozen as frozen
from renorm.freeze import unfreeze_ as unfreeze_
from renorm.groups import check_groups as check_groups
from renorm.groups import parameter_groups as parameter_groups
from renorm.guard import Guard as Guard
from renorm.moments import Moments as Moments
from renorm.moments import Observed as Observed
from renorm.observation import Observation as Observation
from renorm.observe import observe as observe
from renorm.policy import Policy as Policy
from renorm.policy import apply_policy_ as apply_policy_
from renorm.policy import policies as policies
from renorm.policy import policy_table as policy_table
from renorm.profile import Profile as Profile
from renorm.profile import profile as profile
from renorm.recalibrate import Adaptation as Adaptation
from renorm.recalibrate import recalibrate_ as recalibrate_
from renorm.recommend import Plan as Plan
from renorm.recommend import recommend as recommend
from renorm.repair import Repaired as Repaired
from renorm.repair import repair_ as repair_
from renorm.report import notebook as _notebook  # noqa: F401 (registers the faces of results)
from renorm.serve import Served as Served
from renorm.serve import serve_adapters as serve_adapters
from renorm.shift import Shift as Shift
from renorm.sites import Site as Site
from renorm.sites import find_sites as find_sites
from renorm.split import Split as Split
from renorm.split import split as split
from renorm.stream import Stream as Stream
from renorm.surgery import Conversion as Conversion
from renorm.surgery import convert_ as convert_
from renorm.verify import Gap as Gap
from renorm.verify import verify as verify
from renorm.watch import Watch as Watch
from renorm.watch import watch as watch

__version__ = "0.1.0"
__all__ = [
    "Adaptation",
    "Adapter",
    "Advice",
    "Affine",
    "BatchError",
    "Columns",
    "Conversion",
    "Diagnosis",
    "Exported",
    "FineTuned",
    "Folded",
    "Freeze",
    "Gap",
    "Guard",
    "Moments",
    "NoBatchNorm",
    "Observation",
    "Observed",
    "Plan",
    "Policy",
    "Profile",
    "RenormError",
    "Repaired",
    "Score",
    "Served",
    "Shift",
    "Site",
    "Split",
    "Stream",
    "Watch",
    "adapt_",
    "advise",
    "apply_policy_",
    "check_groups",
    "cite",
    "convert_",
    "diagnose",
    "diagnose_file",
    "evaluate",
    "export",
    "find_sites",
    "finetune_",
    "fold",
    "freeze_",
    "frozen",
    "load_adapter_",
    "load_folded_",
    "observe",
    "parameter_groups",
    "policies",
    "policy_table",
    "profile",
    "recalibrate_",
    "recommend",
    "repair_",
    "save_adapter",
    "serve_adapters",
    "split",
    "unfreeze_",
    "verify",
    "watch",
]
