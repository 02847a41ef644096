"""Tries a case: stock and helix in the same ranks, one after the other, and what they say of it."""

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_helix import pretrain_gpt
from megatron_helix.basics.errors import UserError
from megatron_helix.fuzz import compare
from megatron_helix.fuzz.case import SAVED_STEP, Case, given
from megatron_helix.fuzz.compare import Difference, Run
from megatron_helix.fuzz.session import NO_ANSWER, CallFailed, Session
from megatron_helix.fuzz.training import ready, train

EQUAL = "equal"
DISCARDED = "discarded"  # Megatron does not take the flags
REFUSED = "refused"  # helix does not, and says so in a line
STOCK_FAILED = "stock failed"
DIFFERS, CRASHED, HUNG = "differs", "crashed", "hung"
FAILURES = (DIFFERS, CRASHED, HUNG)
DRAWN_AGAIN = (DISCARDED, STOCK_FAILED)
_TABLE = "is refused under --helix-m > 1"  # see compatibility.require_compatible

# What Megatron's checks raise, of flags and, later, where it makes layers of them.
_CHECKS = ("ValueError", "AssertionError", "NotImplementedError")

Comparison = tuple[list[Difference], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a case.

    Attributes:
        case: that was tried.
        status: one of the names above.
        text: what was said: the refusal, the error, the first difference.
        trace: of an error.
        stock: the reference's steps.
        helix: the tried run's.
        margins: the largest error of every quantity, as a part of what is allowed.
        seconds: it took.
    """

    case: Case
    status: str
    text: str = ""
    trace: str = ""
    stock: Run = field(default_factory=list)
    helix: Run = field(default_factory=list)
    margins: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether helix is at fault."""
        return self.status in FAILURES

    def fails_as(self, other: "Outcome") -> bool:
        """Whether both fail, and in the same way."""
        same = self.status == other.status and self.failed
        return same and (self.status != CRASHED or _alike(self.text, other.text))


class Laboratory:
    """Where cases are tried: a session's ranks, a text, and a folder for checkpoints.

    Args:
        folder: a new one.
        ranks: most ranks of a case.
        timeout_s: seconds that a run may take.
    """

    def __init__(self, folder: Path, ranks: int, timeout_s: float):
        self._folder, self._timeout_s = folder, timeout_s
        self._data = ready(folder)
        self._session = Session(ranks, folder / "ranks")

    def __enter__(self) -> "Laboratory":
        return self

    def __exit__(self, *error: object) -> None:
        self._session.end()

    def attempt(self, case: Case) -> Outcome:
        """Try a case."""
        start = time.monotonic()
        saves = self._folder / "checkpoints"
        try:
            outcome = self._attempt(case, saves)
        finally:
            shutil.rmtree(saves, ignore_errors=True)
        return replace(outcome, seconds=time.monotonic() - start)

    def _attempt(self, case: Case, saves: Path) -> Outcome:
        try:
            self._prepared(case.helix(), case.ranks(case.tp))
        except UserError as refusal:
            # The features are those of which the table says that they work.
            status = CRASHED if _TABLE in str(refusal) else REFUSED
            return Outcome(case=case, status=status, text=str(refusal))
        save = _saving if case.deep else lambda folder: []
        try:
            stock = self.train_stock(case, *save(saves / "stock"))
        except CallFailed as failed:
            return _failed(case, DISCARDED if _is_of_flags(failed) else STOCK_FAILED, failed)
        if not compare.is_finite(stock):
            return Outcome(case=case, status=STOCK_FAILED, text="not finite", stock=stock)
        helix: Run = []
        apart: list[Difference] = []
        margins: dict[str, float] = {}
        try:
            helix = self.train_helix(case, *save(saves / "helix"))
            differences, margins = compare.steps(stock, helix, only=1 if case.turns else None)
            apart, ways = differences, [case.deep] if case.deep else []
            if apart and not compare.steps(stock, helix, only=1)[0]:
                # An update enlarges the rounding before it, where a model is ill-conditioned: then
                # stock's own runs part, too, when their micro-batches are cut otherwise. What
                # tells is helix's second step from the weights that stock's first one has made.
                if not ways:
                    self.train_stock(case, *_saving(saves / "stock"))
                    self.train_helix(case, *_saving(saves / "helix"))
                ways = list(dict.fromkeys(("helix", *ways)))
                differences, margins = compare.steps(stock, helix, only=1)
            if ways and not differences:
                differences, more = self._compare_saved(case, saves)
                margins |= more
            for way in ways:
                if not differences:
                    resumed = replace(case, deep=way)
                    differences, more = self._go_on(resumed, saves, stock, helix)
                    margins |= more
        except CallFailed as failed:
            if apart:  # the second steps part, and there is no going on that would tell more
                return _compared(case, stock, helix, apart, margins)
            if self._stock_fails_too(case, saves, failed, bool(helix)):
                return _failed(case, DISCARDED, failed)
            return _failed(case, HUNG if failed.failure.kind == NO_ANSWER else CRASHED, failed)
        return _compared(case, stock, helix, differences, margins)

    def _compare_saved(self, case: Case, saves: Path) -> Comparison:
        """What both have saved after the first step."""
        folders = [str(saves / name / f"iter_{SAVED_STEP:07d}") for name in ("stock", "helix")]
        rate = float(given(case.stock())["--lr"][0])
        return self._call(compare.checkpoints, *folders, rate, ranks=1)[0]

    def _go_on(self, case: Case, saves: Path, stock: Run, helix: Run) -> Comparison:
        """Another layout takes the last step, from one of the checkpoints."""
        saved, whole = ("stock", stock) if case.deep == "helix" else ("helix", helix)
        load = _loading(saves / saved)
        if case.deep == "stock":
            found = self.train_stock(case, *load)
        else:
            found = self.train_helix(self._other(case), *load)
        rest = [steps[SAVED_STEP:] for steps in whole]
        differences, margins = compare.steps(rest, found)
        where = f"after loading what {saved} saved ({case.deep})"
        told = [replace(one, where=f"{one.where}, {where}") for one in differences]
        return told, {f"resumed {name}": margin for name, margin in margins.items()}

    def _other(self, case: Case) -> Case:
        """The layout that goes on: n x m, where heads and channels can be cut so."""
        turned = replace(case, m=case.n, n=case.m) if case.deep == "turned" else case
        try:
            self._prepared(turned.helix(), turned.ranks(turned.tp))
        except UserError:
            return case
        return turned

    def _stock_fails_too(self, case: Case, saves: Path, failed: CallFailed, saved: bool) -> bool:
        """Whether it is Megatron that cannot: at helix's tensor-parallel size, or go on at all.

        Args:
            case: that helix failed in; stock has trained it, perhaps at a smaller size.
            saves: folder for checkpoints.
            failed: how helix failed.
            saved: whether it trained, so that it was going on that failed.
        """
        twin = case
        if case.stock_tp < case.tp:  # what stock takes at that size
            twin = replace(case, heads=case.tp, groups=0, ffn=8 * case.tp)
        elif not saved:
            return False
        first, then = {
            "stock": (case.tp, case.stock_tp),
            "helix": (case.stock_tp, case.tp),
        }.get(case.deep, (case.tp, case.tp))
        try:
            self.train_stock(twin, *(_saving(saves / "twin") if saved else ()), tp=first)
            if saved:
                self.train_stock(twin, *_loading(saves / "twin"), tp=then)
        except CallFailed as other:
            return other.failure.kind == failed.failure.kind and _alike(
                other.failure.text, failed.failure.text
            )
        return False

    def train_stock(self, case: Case, *more: str, tp: int | None = None) -> Run:
        """Stock Megatron's steps, of every rank.

        Args:
            case: the model.
            more: flags beside the case's own.
            tp: another tensor-parallel size than the case's for stock.

        Raises:
            CallFailed: when it did not end well.
        """
        return self._train([*case.stock(tp), *more], case.ranks(tp or case.stock_tp))

    def train_helix(self, case: Case, *more: str) -> Run:
        """Helix's steps, as :meth:`train_stock`."""
        return self._train([*case.helix(), *more], case.ranks(case.tp))

    def _train(self, argv: list[str], ranks: int) -> Run:
        return self._call(train, self._prepared(argv, ranks), ranks=ranks)

    def _prepared(self, argv: list[str], ranks: int) -> list[str]:
        return pretrain_gpt.prepare([*argv, *self._data], ranks)

    def _call(self, function: Callable[..., Any], *args: Any, ranks: int) -> list[Any]:
        return self._session.call(function, *args, ranks=ranks, timeout_s=self._timeout_s)


def _saving(folder: Path) -> list[str]:
    return ["--save", str(folder), "--save-interval", "1"]


def _loading(folder: Path) -> list[str]:
    return ["--load", str(folder), "--ckpt-step", str(SAVED_STEP)]


def _alike(text: str, other: str) -> bool:
    """Whether two messages are the same but for their numbers."""
    return re.sub(r"\d+", "", text) == re.sub(r"\d+", "", other)


def _is_of_flags(failed: CallFailed) -> bool:
    """Whether it was a check's error, before any training: on what the flags say."""
    failure = failed.failure
    return failure.kind in _CHECKS and "train_step" not in failure.functions


def _failed(case: Case, status: str, failed: CallFailed) -> Outcome:
    failure = failed.failure
    return Outcome(
        case=case, status=status, text=f"{failure.kind}: {failure.text}", trace=failure.trace
    )


def _compared(
    case: Case,
    stock: Run,
    helix: Run,
    differences: list[Difference],
    margins: dict[str, float],
) -> Outcome:
    return Outcome(
        case=case,
        status=DIFFERS if differences else EQUAL,
        text=str(differences[0]) if differences else "",
        stock=stock,
        helix=helix,
        margins=margins,
    )
