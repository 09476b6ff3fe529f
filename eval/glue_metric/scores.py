"""The GLUE metrics, by scikit-learn and SciPy."""

from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


def scores(task: str, predictions, references) -> dict[str, float]:
    """Return GLUE's metrics: cola matthews; stsb pearson, spearman; mrpc, qqp accuracy, f1; else accuracy."""
    if task == "cola":
        return {"matthews": float(matthews_corrcoef(references, predictions))}
    if task == "stsb":
        return {
            "pearson": float(pearsonr(predictions, references).statistic),
            "spearman": float(spearmanr(predictions, references).statistic),
        }
    accuracy = {"accuracy": float(accuracy_score(references, predictions))}
    if task in ("mrpc", "qqp"):
        return accuracy | {"f1": float(f1_score(references, predictions))}
    return accuracy
