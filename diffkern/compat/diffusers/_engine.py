"""What all drop-in schedulers share: timesteps found without a device read, cached tables, noise, one fused op.

A drop-in is ``class DDIMScheduler(Fused, diffusers.DDIMScheduler)``: the original's constructor, config, tables and
`set_timesteps` stay; `step` and its kin read their coefficients from a table of float64 rows (`diffkern.plan.COLUMNS`)
that is made on the host once for each (`set_timesteps`, options), and run them by one `diffkern.ops.step`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.plan import COLUMNS, Plan, Row

try:
    from diffusers import SchedulerMixin as SchedulerMixin
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        f"diffkern.compat.diffusers needs diffusers: pip install 'diffkern[diffusers]' (found: {error})"
    ) from error

Self = TypeVar("Self", bound="Fused")
Value = TypeVar("Value")
Host = int | float
MOST_KNOWN = 64
"""Tables that a scheduler keeps for schedules that come back."""
RNGS = ("torch", "counter")
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}
"""diffusers' names of the predictions in diffkern's."""
_AT = {name: j for j, name in enumerate(COLUMNS)}


class Clock:
    """The host copy of a tensor of timesteps: made once a `set_timesteps`, by the one device read that this takes."""

    def __init__(self, timesteps: Tensor) -> None:
        self.timesteps = timesteps
        self.counts = not timesteps.is_inference()
        self.version = written(timesteps)
        self.times: list[Host] = timesteps.tolist()
        self.positions: dict[Host, list[int]] = {}
        for i, t in enumerate(self.times):
            self.positions.setdefault(t, []).append(i)
        self.dtype, self.start = timesteps.dtype, timesteps.data_ptr()
        self.stride = (timesteps.stride(0) or 1) * timesteps.element_size()
        self.bytes = self.stride * len(self.times)

    def __reduce__(self) -> tuple[type[Clock], tuple[Tensor]]:
        return Clock, (self.timesteps,)  # a copy has addresses of its own

    def position(self, timestep: Any) -> int | None:
        """Where a tensor lies in the timesteps if it is a view of one element of them: an address, no device read."""
        if not isinstance(timestep, Tensor):
            return None
        ahead = timestep.data_ptr() - self.start
        if not 0 <= ahead < self.bytes or timestep.dtype is not self.dtype or not timestep.numel():
            return None
        if timestep.dim() and timestep.numel() != 1 and any(timestep.stride()):
            return None
        at, off = divmod(ahead, self.stride)
        return at if off == 0 else None

    def value(self, timestep: Any) -> Host:
        """A timestep as a Python number. Tensors on a device that are no view of the timesteps are read (a sync)."""
        at = self.position(timestep)
        if at is not None:
            return self.times[at]
        return timestep.item() if isinstance(timestep, Tensor | np.generic) else timestep


class Entry:
    """A value and what it was made of."""

    def __init__(self, value: Any, sources: tuple[Any, ...], contents: tuple[Any, ...]) -> None:
        self.value, self.sources, self.contents = value, sources, contents
        tensors = [source for source in sources if isinstance(source, Tensor)]
        self.counting = [t for t in tensors if not t.is_inference()]
        self.versions = [t._version for t in self.counting]
        self.others = [(t, written(t)) for t in tensors if t.is_inference()]

    def unchanged(self) -> bool:
        """Whether no source was written to."""
        return [t._version for t in self.counting] == self.versions and all(written(t) == was for t, was in self.others)

    def holds(self, i: int, source: Any) -> bool:
        """Whether source i is this one, unchanged."""
        return self.sources[i] is source and (not isinstance(source, Tensor) or self.unchanged())


class Hot:
    """The table in use (or a tuple with it), and what it was made of: a loop's next step finds it by identity.

    ``sources`` are tensors that count their versions, which only grow: their sum tells whether one was written to.
    """

    __slots__ = ("config", "key", "rows", "sources", "start", "stride", "times", "value", "version")

    def __init__(
        self, key: Any, value: Any, config: Any, sources: tuple[Tensor, ...], clock: Clock | None = None
    ) -> None:
        self.key, self.value, self.config, self.sources, self.rows = key, value, config, sources, len(value)
        self.version = sum(source._version for source in sources)
        if clock is not None:
            self.times: list[Any] = clock.times
            self.start, self.stride = clock.start, clock.stride

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copy has addresses of its own


class Cache(dict[Any, Any]):
    """Shared by shallow copies of a scheduler; pickles and deep copies start without."""

    def __reduce__(self) -> tuple[type[Cache], tuple[()]]:
        return Cache, ()


class Fused:
    """Mixin: goes before the original class. Options live in attributes, never in the config."""

    _dk_rng: str = "torch"
    _dk_exact: bool = False
    _dk_seeds: int | Tensor | None = None
    _dk_hot: Hot | None = None

    # The original's.
    timesteps: Tensor
    num_inference_steps: Any
    config: Any
    _internal_dict: Any

    def diffkern(
        self: Self, *, rng: str | None = None, seeds: int | Tensor | None = None, exact: bool | None = None
    ) -> Self:
        """Set diffkern's options and return the scheduler; what is not given stays.

        ``rng="torch"`` (default) consumes the torch generator exactly as the original does. ``rng="counter"`` draws
        noise by address: ``seeds`` is int64 [B], one a sample, or an integer (`diffkern.seeds` makes the samples' of
        it); without seeds they come from the initial seeds of the ``generator`` given to `step`. ``exact=True`` takes
        the right branch where the original's numerical choice is questionable (docs/compat-diffusers.md lists them).
        """
        if rng is not None:
            if rng not in RNGS:
                raise ValueError(f"rng must be one of {', '.join(RNGS)}, got {rng!r}")
            self._dk_rng = rng
        if seeds is not None:
            if isinstance(seeds, Tensor) and (seeds.dtype != torch.int64 or seeds.dim() != 1):
                raise ValueError(
                    f"seeds must be an integer or int64 [B], got {seeds.dtype} of shape {list(seeds.shape)}"
                )
            if not isinstance(seeds, int | Tensor):
                raise ValueError(f"seeds must be an integer or int64 [B], got {type(seeds).__name__}")
            self._dk_seeds = seeds
        if exact is not None:
            self._dk_exact = bool(exact)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: not what belongs to tensors of this object, by identity and version."""
        state = self.__dict__.copy()
        state.pop("_dk_ahead", None)
        state.pop("_dk_tables_now", None)
        return state

    # ---------------------------------------------------------------------------------------------- time and tables
    @property
    def _dk_clock(self) -> Clock:
        found: Clock | None = self.__dict__.get("_dk_clock_now")
        now = self.timesteps
        if (
            found is None
            or found.timesteps is not now
            or found.version != (now._version if found.counts else written(now))
        ):
            found = self.__dict__["_dk_clock_now"] = Clock(now)
        return found

    def _dk_cached(self, key: tuple[Any, ...], sources: tuple[Any, ...], build: Callable[[], Value]) -> Value:
        """``build()``, kept under ``key`` as long as the ``sources`` (tensors, the config, the clock) are the same
        objects, and found again when other objects hold the same: a second `set_timesteps` builds nothing."""
        cache = self.__dict__.setdefault("_dk_cache", Cache())
        entry: Entry | None = cache.get(key)
        if entry is not None:
            for kept, now in zip(entry.sources, sources, strict=True):
                if kept is not now:
                    break
            else:
                if entry.unchanged():
                    return entry.value
        known = self.__dict__.setdefault("_dk_known", Cache())
        contents = tuple(
            entry.contents[i] if entry is not None and entry.holds(i, source) else content(source)
            for i, source in enumerate(sources)
        )
        value = known.get((key, contents))
        if value is None:
            # Tables outlive the mode that a user was in: made on the CPU, and fit for autograd.
            with torch.inference_mode(False), torch.device("cpu"):
                value = build()
            while len(known) >= MOST_KNOWN:
                known.pop(next(iter(list(known)), None), None)  # a list: copies in other threads fill it too
            known[(key, contents)] = value
        if len(cache) > 4 * MOST_KNOWN:
            cache.clear()
        cache[key] = Entry(value, sources, contents)
        return value

    def _dk_on(self, table: Tensor, device: torch.device) -> Tensor:
        """A table on a device, for rows that the device picks (a timestep a sample)."""
        if device.type == "cpu":
            return table
        return self._dk_cached(("on", id(table), str(device)), (table,), lambda: table.to(device))

    # ---------------------------------------------------------------------------------------------- noise
    def _dk_noise(
        self, like: Tensor, generator: Any, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(noise, seeds) of one draw of the shape of ``like``, one of them None: a tensor drawn as the original draws
        it (``dtype`` that of ``like`` by default), or the seeds of noise by address."""
        if self._dk_rng == "torch":
            drawn = randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype or like.dtype)
            return drawn, None
        return None, self._dk_seeds_of(like, generator)

    def _dk_seeds_of(self, like: Tensor, generator: Any) -> Tensor:
        batch, given = like.shape[0], self._dk_seeds
        if given is None:
            if generator is None:
                raise ValueError(
                    'rng="counter" needs scheduler.diffkern(seeds=...) or a generator given to step, got neither'
                )
            if isinstance(generator, list) and len(generator) != 1:
                starts = [g.initial_seed() for g in generator]
                if len(starts) != batch:
                    raise ValueError(f"generator must hold one generator a sample ({batch}), got {len(starts)}")
                given = torch.tensor([s - (1 << 64) if s >= 1 << 63 else s for s in starts], dtype=torch.int64)
            else:
                given = (generator[0] if isinstance(generator, list) else generator).initial_seed()
        if isinstance(given, Tensor):
            if given.shape[0] != batch:
                raise ValueError(f"seeds must hold one seed a sample ({batch}), got {given.shape[0]}")
            return given if given.device == like.device else given.to(like.device)
        job = int(given)
        return self._dk_cached(
            ("seeds", job, batch, str(like.device)), (), lambda: ops.seeds(job, batch, device=like.device)
        )

    # ---------------------------------------------------------------------------------------------- the op
    def _dk_run(
        self,
        x: Tensor,
        m: Tensor | None,
        *histories: Tensor | None,
        table: Tensor,
        row: int = 0,
        index: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
        state: torch.dtype | None = None,
        **wants: Any,
    ) -> tuple[Tensor, Any, Any, Any]:
        """One `ops.step` in the dtype ``state`` (by default what torch promotes x and m to)."""
        if m is not None and m.shape != x.shape:
            x, m = torch.broadcast_tensors(x, m)
        if state is None:
            state = x.dtype if m is None or m.dtype is x.dtype else torch.promote_types(x.dtype, m.dtype)
        if x.dtype is not state:
            x = x.to(state)
        if noise is not None:
            noise = as_dtype(noise if noise.shape == x.shape else noise.expand(x.shape), state)
        if histories:
            histories = tuple(h if h is None or h.dtype is state else h.to(state) for h in histories)
        if index is not None:
            table = self._dk_on(table, x.device)
        return ops.step(x, m, None, *histories, table=table, row=row, index=index, noise=noise, seeds=seeds, **wants)

    def _dk_thresholded(
        self,
        x: Tensor,
        m: Tensor,
        *histories: Tensor | None,
        table: Tensor,
        row: int,
        index: Tensor | None,
        **wants: Any,
    ) -> tuple[Tensor, Any, Any, Any]:
        """`_dk_run` with the original's dynamic thresholding between x0 and x': three fused ops."""
        first, second = self._dk_cached(("split", id(table)), (table,), lambda: split(table))
        x0 = self._dk_run(x, m, table=first, row=row, index=index)[0]
        x0 = self._dk_threshold(x0)
        out = self._dk_run(x, m, x0, *histories, table=second, row=row, index=index, **wants)
        return out[0], x0, out[2], out[3]

    def _dk_threshold(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding (arXiv 2205.11487); the original's own where x0 has a gradient or its maximum is odd."""
        config = self.config
        if x0.requires_grad or not config.sample_max_value >= 1.0:
            return self._threshold_sample(x0)  # type: ignore[attr-defined]
        return ops.dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)

    def _dk_noised(
        self,
        x: Tensor,
        noise: Tensor,
        timesteps: Tensor | int,
        scales: Callable[[], Tensor],
        key: tuple[Any, ...],
        source: Any,
    ) -> Tensor:
        """s x + n noise with (s, n) = scales()[timesteps], by one `ops.noising`; x and noise broadcast and promote as
        in torch. timesteps: int [B], one for all, or a row known on the host. scales: float64 [T, 2] on the CPU."""
        if x.shape != noise.shape:
            x, noise = torch.broadcast_tensors(x, noise)
        state = promote(x.dtype, noise.dtype)

        def build() -> Tensor:
            two = scales()
            return torch.cat([two, torch.zeros_like(two)], 1).contiguous().to(x.device)

        table = self._dk_cached(("noised", str(x.device), *key), (source,), build)
        if isinstance(timesteps, int):
            return ops.noising(as_dtype(x, state), table[timesteps : timesteps + 1], noise=as_dtype(noise, state))[0]
        index = timesteps.reshape(()) if timesteps.numel() == 1 else timesteps.reshape(-1)
        if index.dim() and x.shape[0] == 1:
            x, noise = (t.expand(index.shape[0], *t.shape[1:]) for t in (x, noise))
        try:
            return ops.noising(as_dtype(x, state), table, index.to(x.device), noise=as_dtype(noise, state))[0]
        except RuntimeError:
            scales()[timesteps]  # an index that the original refuses gets its exception
            raise


def version(source: Any) -> int:
    """How often a tensor has been written to in place (0 where torch does not count)."""
    return source._version if isinstance(source, Tensor) and not source.is_inference() else 0


def written(table: Tensor) -> Any:
    """What changes when a table is written to in place: its count of writes, where torch does not count them (tensors
    made in `torch.inference_mode`) its numbers, and nothing for such a table on a device, which is never read."""
    if not table.is_inference():
        return table._version
    return table.tolist() if table.device.type == "cpu" else 0


class Same:
    """Equal to what stands for the same object, which it keeps alive."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __hash__(self) -> int:
        return id(self.source)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.source is self.source


def content(source: Any) -> Any:
    """What is in a source, hashable; tensors on a device (never read) and tables stand for themselves."""
    if isinstance(source, Clock):
        return array("d", source.times).tobytes()  # bytes remember their hash
    if isinstance(source, Mapping):
        return repr(sorted(source.items()))
    if isinstance(source, Tensor) and source.device.type == "cpu" and source.dim() <= 1:
        values = source.tolist()
        return source.dtype, source.dim(), array("d", values if source.dim() else [values]).tobytes()
    return Same(source)


def promote(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    return a if a is b else torch.promote_types(a, b)  # which is dispatched as an op


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def host(table: Any, exact: bool = False) -> Tensor:
    """A table of the original on the CPU, for coefficients: in its own float32, or widened where ``exact``."""
    found = torch.as_tensor(table).detach().cpu()
    return found.double() if exact else found


def table_of(rows: int, **columns: Any) -> Tensor:
    """[rows, 21] float64: the given columns (numbers or [rows]), the others at a row's defaults."""
    table = torch.zeros(rows, len(COLUMNS), dtype=torch.float64)
    table[:, _AT["clip"]] = float("inf")
    table[:, _AT["k"]] = 1.0
    table[:, _AT["stream"]] = streams.STEP + torch.arange(rows, dtype=torch.float64)
    for name, value in columns.items():
        table[:, _AT[name]] = torch.as_tensor(value, dtype=torch.float64)
    return table


def column(table: Tensor, name: str) -> Tensor:
    """A column of a table, as a view."""
    return table[:, _AT[name]]


def with_column(table: Tensor, name: str, value: float) -> Tensor:
    """A copy of a table with one column set."""
    copy = table.clone()
    column(copy, name)[:] = value
    return copy


def split(table: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in two, for what comes between x0 and x': x0 = p x + q m, and the rest, which reads x0 as h0 (the other
    histories move up by one) and clips nothing."""
    clean = table_of(table.shape[0], p=column(table, "p"), q=column(table, "q"), b=1.0)
    rest = table.clone()
    column(rest, "clip")[:] = float("inf")
    for k in range(3, 0, -1):
        column(rest, f"e{k}")[:] = column(table, f"e{k - 1}")
    column(rest, "e0")[:] = column(table, "b")
    for name in ("p", "q", "b"):
        column(rest, name)[:] = 0.0
    return clean, rest


def plan_of(
    name: str,
    table: Tensor,
    times: Sequence[Host],
    prediction: str,
    *,
    saves: Sequence[Sequence[tuple[int, str]]] | None = None,
    learned: Tensor | None = None,
    init_scale: float = 1.0,
    first_k: float = 1.0,
    time_dtype: str = "int64",
) -> Plan:
    """Rows of a table as a plan that `diffkern.sample` runs: row i is given the model's time ``times[i]``. ``learned``
    [S, 2] holds r0 and r1 where the model learned its variance."""
    rows = []
    for i, (values, time) in enumerate(zip(table.tolist(), times, strict=True)):
        entries = dict(zip(COLUMNS, values, strict=True))
        entries["stream"], entries["known_stream"] = streams.STEP + i, streams.KNOWN + i
        if learned is not None:
            entries["r0"], entries["r1"] = learned[i].tolist()
        rows.append(Row(**entries, time=float(time), saves=tuple(saves[i]) if saves else ()))
    return Plan(
        name=name,
        rows=tuple(rows),
        init_scale=init_scale,
        first_k=first_k,
        prediction=PREDICTIONS.get(prediction, prediction),
        time_dtype=time_dtype,
        learned_variance=learned is not None,
    )
