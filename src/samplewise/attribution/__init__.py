"""Scores of training samples: which are mislabelled, odd or dominating.

The gradient norm is GraNd for one trained model and EL2N the error of its prediction, both of Paul et al. 2021, "Deep
Learning on a Data Diet" (arXiv:2107.07075). Neither is an influence: no score predicts what removing a sample does.
"""

from .coverage import Coverage as Coverage
from .groups import Groups as Groups
from .groups import group_parameters as group_parameters
from .ranking import RANKINGS as RANKINGS
from .ranking import Detection as Detection
from .ranking import TopShare as TopShare
from .ranking import default_ranking as default_ranking
from .ranking import detection as detection
from .ranking import rank as rank
from .ranking import top_share as top_share
from .scoring import BatchScores as BatchScores
from .scoring import ClassScores as ClassScores
from .scoring import score as score
from .scoring import score_batches as score_batches
from .scoring import trainable as trainable
from .task import ScoreTask as ScoreTask
from .task import ScoringError as ScoringError
from .task import as_score_task as as_score_task
