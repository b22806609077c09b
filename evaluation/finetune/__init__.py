"""A backbone trained further with labels: fine-tuning, few labels, transfer to other data sets.

`ibeton finetune` (`python -m evaluation.finetune`) is the command; `load_classifier(path)` gives
what it trained.
"""

from ibeton.evaluation.finetune.classifier import Classifier, load_classifier

__all__ = ["Classifier", "load_classifier"]
