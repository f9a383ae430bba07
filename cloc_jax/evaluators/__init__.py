"""Evaluators: host NumPy over what one pass of a model gives. Each is given functions and arrays, never a model.

`collect` encodes a data set; each evaluator's `run` yields (name, value); `evaluate_all` runs those that apply.
"""
from cloc_jax.evaluators.collect import EncoderFns, Predictions, collect
from cloc_jax.evaluators.coverage import Coverage
from cloc_jax.evaluators.crop import crop_regions
from cloc_jax.evaluators.gather import gather, merge
from cloc_jax.evaluators.grounding import Grounding
from cloc_jax.evaluators.pointing import PointingGame
from cloc_jax.evaluators.pooled import pooled_regions
from cloc_jax.evaluators.proposals import ProposalGrounding
from cloc_jax.evaluators.ranking import NothingToMeasure
from cloc_jax.evaluators.region_recognition import RegionRecognition
from cloc_jax.evaluators.region_retrieval import RegionRetrieval
from cloc_jax.evaluators.retrieval import ImageTextRetrieval
from cloc_jax.evaluators.suite import Evaluation, evaluate_all
from cloc_jax.evaluators.zeroshot import ZeroShot

__all__ = ['Coverage', 'EncoderFns', 'Evaluation', 'Grounding', 'ImageTextRetrieval', 'NothingToMeasure',
           'PointingGame', 'Predictions', 'ProposalGrounding', 'RegionRecognition', 'RegionRetrieval', 'ZeroShot',
           'collect', 'crop_regions', 'evaluate_all', 'gather', 'merge', 'pooled_regions']
