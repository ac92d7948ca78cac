"""Text as tokens: what is trained on, what is held out, and which tokens a step sees."""

from ultramem.runtime.data.batches import IGNORE, Batch, evaluation_batches, step_seed, training_batch
from ultramem.runtime.data.corpus import Corpus, load_corpus
from ultramem.runtime.data.documents import Documents, Stream
from ultramem.runtime.tokenizer import END_OF_TEXT

__all__ = [
    "END_OF_TEXT",
    "IGNORE",
    "Batch",
    "Corpus",
    "Documents",
    "Stream",
    "evaluation_batches",
    "load_corpus",
    "step_seed",
    "training_batch",
]
