"""Segmentation metrics from a confusion matrix, and the metrics of the Keras BraTS U-Net on probabilities."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fastunet.arguments import checked
from fastunet.functional import dice_confusion
from fastunet.functional._checks import check_classes, processes_of
from fastunet.functional.dice_arguments import MOST_CLASSES, raise_for_wrong, validated
from fastunet.functional.dice_rule import check_rule, dice_score, iou_score

KERAS_EPSILON = 1e-7
"""``keras.backend.epsilon()``, added to the denominators of precision, sensitivity and specificity."""


@checked
class SegmentationMetrics:
    """Accuracy, IoU, Dice, precision, sensitivity and specificity of all pixels and of each case.

    The state is one K × K matrix of counts, and one more for each case that is named, on the device of the labels.
    :meth:`update` never waits for the device; :meth:`compute` does.

    Args:
        num_classes: K.
        class_names: K names for the keys of the results; "0", "1", … by default.
        empty: what Dice and IoU of a class are where the truth does not have it: "one" (the rule of BraTS: 1 if the
            prediction does not have it either, else 0), "skip" (NaN, left out of the mean) or "smooth".
        smooth: the constant s of Dice and IoU; by default 1 with empty="smooth" and 0 with the others.
        regions: name → class indices that are scored together as one foreground, for example
            ``{"whole tumour": (1, 2, 3)}``.
        ignore_index: pixels with this true label are not counted.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: names, regions or a rule that do not fit.
    """

    def __init__(
        self,
        num_classes: int,
        class_names: Sequence[str] | None = None,
        *,
        empty: str = "one",
        smooth: float | None = None,
        regions: Mapping[str, Iterable[int]] | None = None,
        ignore_index: int | None = None,
        backend: str | None = None,
    ):
        check_classes(num_classes, MOST_CLASSES)
        self.num_classes = num_classes
        self.class_names = [str(i) for i in range(num_classes)] if class_names is None else list(class_names)
        if len(self.class_names) != num_classes:
            raise ValueError(f"{len(self.class_names)} class names for {num_classes} classes")
        self.regions = {name: tuple(classes) for name, classes in (regions or {}).items()}
        for name, classes in self.regions.items():
            if not classes or not all(0 <= c < num_classes for c in classes):
                raise ValueError(f"region {name!r} is made of {classes}; expected some of 0 to {num_classes - 1}")
        self.empty = empty
        self.smooth = (1.0 if empty == "smooth" else 0.0) if smooth is None else smooth
        check_rule(self.empty, self.smooth)
        self.ignore_index = ignore_index
        self.backend = backend
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._pooled: torch.Tensor | None = None
        self._cases: dict[Hashable, torch.Tensor] = {}

    def update(
        self, logits_or_labels: torch.Tensor, labels: torch.Tensor, case: Hashable | Sequence[Hashable] | None = None
    ) -> None:
        """Counts a batch.

        Args:
            logits_or_labels: (N, K, H, W) logits or probabilities, or (N, H, W) predicted labels.
            labels: (N, H, W) true labels, in any form that
                :func:`~fastunet.functional.dice_confusion.confusion_matrix` takes.
            case: the case that the whole batch belongs to, or a list or tuple of the N samples' cases; slices of one
                case may come in any number of batches.

        Raises:
            ValueError: shapes or dtypes that do not fit. Labels out of range are reported by :meth:`compute`.
        """
        counts = dice_confusion.confusion_counts(
            logits_or_labels, labels, self.num_classes, ignore_index=self.ignore_index, backend=self.backend
        )
        if len(counts) == 0:
            return
        if isinstance(case, (list, tuple)):
            if len(case) != len(counts):
                raise ValueError(f"{len(case)} case names for a batch of {len(counts)}")
            for name, sample in zip(case, counts):
                self._cases[name] = _added(self._cases.get(name), sample)
        total = _combined(counts)
        if case is not None and not isinstance(case, (list, tuple)):
            self._cases[case] = _added(self._cases.get(case), total)
        self._pooled = _added(self._pooled, total)

    def merge(self, other: SegmentationMetrics) -> SegmentationMetrics:
        """Adds the counts of ``other``, those of a case known to both to one case; returns ``self``."""
        if other.num_classes != self.num_classes:
            raise ValueError(f"metrics of {other.num_classes} classes cannot join metrics of {self.num_classes}")
        if other._pooled is not None:
            self._pooled = _added(self._pooled, other._pooled)
        for name, counts in other._cases.items():
            self._cases[name] = _added(self._cases.get(name), counts)
        return self

    def all_reduce(self, group: Any = None) -> SegmentationMetrics:
        """Merges the counts of every process of ``group`` (None: all), after which all hold the same; returns self."""
        processes = processes_of(group, "all_reduce")
        cases = {name: _on_host(counts) for name, counts in self._cases.items()}
        state = None if self._pooled is None else _on_host(self._pooled), cases
        states: list[Any] = [None] * processes
        torch.distributed.all_gather_object(states, state, group=group)
        self.reset()
        for pooled, cases in states:
            self._pooled = self._pooled if pooled is None else _added(self._pooled, pooled)
            for name, counts in cases.items():
                self._cases[name] = _added(self._cases.get(name), counts)
        return self

    @property
    def cases(self) -> list[Hashable]:
        """The names of the cases seen, in order of appearance."""
        return list(self._cases)

    @property
    def matrix(self) -> torch.Tensor:
        """The pooled (K, K) int64 counts on the CPU, rows truth."""
        if self._pooled is None:
            return torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)
        return self._checked(self._pooled)

    def compute(self, case: Hashable | None = None) -> dict[str, Any]:
        """The metrics of all pixels, or of one ``case``.

        Returns:
            "accuracy"; "mean_iou" (as Keras' ``MeanIoU``: over the classes that truth or prediction have); "dice", the
            mean over classes; "classes" and "regions": name → {"dice", "iou", "precision", "sensitivity",
            "specificity"}, each a float, NaN where "skip" leaves it out.

        Raises:
            KeyError: an unknown case.
            ValueError: a label out of range was counted, and the message names it; or tensors on "meta".
        """
        matrix = (self.matrix if case is None else self._checked(self._cases[case])).double()
        total = matrix.sum()
        hits = matrix.diagonal()
        truth, predicted = matrix.sum(1), matrix.sum(0)
        union = truth + predicted - hits
        present = union > 0
        scores = self._scores(hits, predicted, truth, total)
        result: dict[str, Any] = {
            "accuracy": (hits.sum() / total).item() if total else 0.0,
            "mean_iou": (hits[present] / union[present]).mean().item() if present.any() else 0.0,
            "dice": scores["dice"].nanmean().item(),
            "classes": _rows(self.class_names, scores),
        }
        sets = torch.zeros(len(self.regions), self.num_classes, dtype=torch.float64)
        for row, classes in zip(sets, self.regions.values()):
            row[list(classes)] = 1
        region_hits = ((sets @ matrix) * sets).sum(1)
        result["regions"] = _rows(self.regions, self._scores(region_hits, sets @ predicted, sets @ truth, total))
        return result

    def compute_cases(self) -> dict[Hashable, dict[str, Any]]:
        """:meth:`compute` of every case."""
        return {name: self.compute(name) for name in self._cases}

    def _scores(
        self, hits: torch.Tensor, predicted: torch.Tensor, truth: torch.Tensor, total: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        rule: dict[str, Any] = dict(smooth=self.smooth, empty=self.empty)
        return {
            "dice": dice_score(hits, predicted, truth, **rule),
            "iou": iou_score(hits, predicted, truth, **rule),
            "precision": hits / (predicted + KERAS_EPSILON),
            "sensitivity": hits / (truth + KERAS_EPSILON),
            "specificity": (total - truth - predicted + hits) / (total - truth + KERAS_EPSILON),
        }

    def _checked(self, counts: torch.Tensor) -> torch.Tensor:
        counts = _on_host(counts)
        raise_for_wrong(int(counts[-2]), int(counts[-1]), self.num_classes)
        return counts[:-2].reshape(self.num_classes, self.num_classes)


def _on_host(counts: torch.Tensor) -> torch.Tensor:
    if counts.is_meta:
        raise ValueError("the counts are on meta, without numbers: update() was given labels there")
    return counts.cpu()


def _combined(counts: torch.Tensor) -> torch.Tensor:
    """Rows of ``confusion_counts`` as one: sums, and the greatest wrong label."""
    return torch.cat([counts[:, :-1].sum(0), counts[:, -1:].amax(0)])


def _added(total: torch.Tensor | None, counts: torch.Tensor) -> torch.Tensor:
    if total is not None and total.is_meta != counts.is_meta:
        raise ValueError("counts of meta tensors hold no data, to be added to those of others")
    return counts.clone() if total is None else _combined(torch.stack([total, counts.to(total.device)]))


def _rows(names: Iterable[str], scores: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    return {name: {key: values[i].item() for key, values in scores.items()} for i, name in enumerate(names)}


@checked
def dice_of_class(y_pred: torch.Tensor, y_true: torch.Tensor, index: int, *, epsilon: float = 1e-6) -> torch.Tensor:
    """Dice of one class as the Keras BraTS U-Net reports it: ``2 sum(|t p|) / (sum(t²) + sum(p²) + epsilon)``.

    Args:
        y_pred: (N, C, H, W) probabilities.
        y_true: one-hot (N, C, H, W), or class indices (N, H, W) or (N, 1, H, W).
        index: the class; in BraTS 1 is necrotic, 2 oedema, 3 enhancing.
    """
    truth = _one_hot(y_pred, y_true)
    if not 0 <= index < truth.shape[1]:
        raise ValueError(f"index is {index}; expected 0 to {truth.shape[1] - 1}")
    t, p = truth[:, index].double(), y_pred[:, index].double()
    return 2 * (t * p).abs().sum() / (t.square().sum() + p.square().sum() + epsilon)


@checked
def precision(y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
    """As the Keras BraTS U-Net reports it, all classes together: ``TP / (predicted positives + 1e-7)``.

    TP is ``sum(round(clip(t p, 0, 1)))`` over pixels and classes, so that only probabilities above one half count.

    Args:
        y_pred: (N, C, H, W) probabilities.
        y_true: one-hot (N, C, H, W), or class indices (N, H, W) or (N, 1, H, W).
    """
    return _positives(_one_hot(y_pred, y_true) * y_pred) / (_positives(y_pred) + KERAS_EPSILON)


@checked
def sensitivity(y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
    """As :func:`precision`: ``TP / (possible positives + 1e-7)``, where possible positives are ``sum(round(t))``."""
    t = _one_hot(y_pred, y_true)
    return _positives(t * y_pred) / (_positives(t) + KERAS_EPSILON)


@checked
def specificity(y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
    """As :func:`precision`: ``TN / (possible negatives + 1e-7)``, TN being ``sum(round(clip((1-t)(1-p), 0, 1)))``."""
    t = _one_hot(y_pred, y_true)
    return _positives((1 - t) * (1 - y_pred)) / (_positives(1 - t) + KERAS_EPSILON)


def _positives(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(0, 1).round().sum(dtype=torch.float64)


def _one_hot(y_pred: torch.Tensor, y_true: torch.Tensor) -> torch.Tensor:
    targets, *_ = validated(y_pred, y_true)
    if targets.ndim == 2:
        classes = torch.arange(max(y_pred.shape[1], 2), device=y_pred.device)[-y_pred.shape[1] :]
        targets = targets[:, None] == classes[:, None]
    return targets.to(y_pred.dtype).reshape(y_pred.shape)
