"""What `patch` and `unpatch` did, to read and to print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diffkern.compat.guided_diffusion.unet import FALLBACKS

__all__ = ["Change", "Report"]


@dataclass(frozen=True)
class Change:
    """One attribute of the package: what became of it."""

    name: str
    """With its module and class."""
    reason: str | None = None
    """Why it was kept; None where it was replaced."""
    note: str | None = None
    """What else is to be known of it."""

    @property
    def replaced(self) -> bool:
        return self.reason is None


class Report(tuple[Change, ...]):
    """What was done, one `Change` an attribute; `print` it to read it."""

    package: str

    def __new__(cls, package: str, changes: Iterable[Change]) -> Report:
        report = super().__new__(cls, changes)
        report.package = package
        return report

    @property
    def replaced(self) -> tuple[Change, ...]:
        """What was replaced (`unpatch`: restored)."""
        return tuple(change for change in self if change.replaced)

    @property
    def kept(self) -> tuple[Change, ...]:
        """What was left as it was, each with its reason."""
        return tuple(change for change in self if not change.replaced)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Reason -> attention calls of this process that ran on torch's own kernels until now."""
        return dict(FALLBACKS)

    def __str__(self) -> str:
        if not self:
            return f"{self.package or 'no package'}: nothing to replace"
        groups: dict[tuple[str, str | None, str | None], list[str]] = {}
        for change in self:
            owner, _, attribute = change.name.rpartition(".")
            groups.setdefault((owner, change.reason, change.note), []).append(attribute)
        lines = [f"{self.package}: {len(self.replaced)} replaced, {len(self.kept)} kept"]
        for (owner, reason, note), names in groups.items():
            where = owner.removeprefix(f"{self.package}.")
            what = f"{where}: {', '.join(names)}"
            lines.append(
                f"  {what} kept: {reason}" if reason is not None else f"  {what}{f' ({note})' if note else ''}"
            )
        lines += [f"  ran on torch's own attention in {n} calls: {reason}" for reason, n in self.fallbacks.items()]
        return "\n".join(lines)
