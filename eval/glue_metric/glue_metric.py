"""The GLUE metrics as an `evaluate` module that downloads nothing: `evaluate.load("eval/glue_metric", "cola")`."""

import datasets
import evaluate

from .scores import TASKS, scores

CITATION = "Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform, ICLR 2019 (arXiv 1804.07461)"
INPUTS = """
Args:
    predictions: class numbers, or scores for stsb.
    references: the same of the labels.
Returns:
    cola: matthews; stsb: pearson, spearman; mrpc, qqp: accuracy, f1; the others: accuracy. From -1 or 0 to 1.
"""


class GlueMetric(evaluate.Metric):
    """Matthews correlation, Pearson and Spearman, accuracy and F1, whichever GLUE reports for the task."""

    def _info(self):
        if self.config_name not in TASKS:
            raise ValueError(f"task={self.config_name!r} must be one of {', '.join(TASKS)}.")
        kind = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": kind, "references": kind}),
            format="numpy",
        )

    def _compute(self, predictions, references):
        return scores(self.config_name, predictions, references)
