"""What all drop-in schedulers are: diffusers' class and an engine, which runs its steps by one `diffkern.ops.step`.

A drop-in is ``class DDIMScheduler(DropIn, diffusers.DDIMScheduler)`` with ``_engine = Attached(TimesEngine)``: the
original's constructor, config, tables and `set_timesteps` stay; `step` and its kin take their coefficients from a table
of float64 rows (`diffkern.plan.COLUMNS`), which the engine keeps for each (`set_timesteps`, options), and run them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Generic, TypeVar, get_args, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern import ops
from diffkern.compat.diffusers._carried import Carried, unrounded
from diffkern.compat.diffusers._host import Clock
from diffkern.compat.kit.rows import SIXTEEN, as_dtype, column, promote, split
from diffkern.compat.kit.tables import Tables, version
from diffkern.integers import as_integer
from diffkern.names import Rng

try:
    from diffusers import SchedulerMixin as SchedulerMixin
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        f"diffkern.compat.diffusers needs diffusers: pip install 'diffkern[diffusers]' (found: {error})"
    ) from error

Results = tuple[Tensor, Any, Any, Any]
"""(x', x0 or None, s or None, the next model's input or None) of an op."""
RNGS = get_args(Rng)


class Rows:
    """A table and the op bound to it, for what it gives beside x': what steps are run with, made once."""

    __slots__ = ("_narrow", "count", "onward", "plain", "table", "wants")

    def __init__(self, table: Tensor, *, want_x0: bool = False, want_s: bool = False) -> None:
        self.table, self.count = table, len(table)
        self.wants: dict[str, Any] = {"want_x0": want_x0, "want_s": want_s}
        self.plain = ops.bound_step(table, **self.wants)
        self.onward = ops.bound_step(table, next_copies=1, **self.wants)
        """The same, and the next model's input."""
        self._narrow: dict[torch.dtype, ops.BoundStep] = {}

    def narrow(self, dtype: torch.dtype) -> ops.BoundStep:
        """The same on a float32 state, and x' in this dtype in the place of the model's input."""
        found = self._narrow.get(dtype)
        if found is None:
            table = unscaled(self.table)
            found = self._narrow[dtype] = ops.bound_step(table, next_copies=1, next_dtype=dtype, **self.wants)
        return found


def unscaled(table: Tensor) -> Tensor:
    """The rows with x' itself as the model's input."""
    with torch.inference_mode(False):
        copy = table.clone()
        column(copy, "k").fill_(1.0)
        return copy


def free(*tensors: Tensor | None) -> bool:
    """Whether no derivative is asked for: then a bound op may take them."""
    if forward_ad._current_level >= 0:
        return False
    if torch.is_grad_enabled():
        for t in tensors:  # a loop: any() with a generator takes twice as long
            if t is not None and t.requires_grad:
                return False
    return True


def fits(m: Tensor, x: Tensor, *others: Tensor | None) -> bool:
    """Whether a bound op can take the operands as they are: one dtype and shape, no derivative asked for."""
    if m.shape != x.shape or forward_ad._current_level >= 0:
        return False
    dtype, grad, fit = x.dtype, torch.is_grad_enabled(), True
    for t in (m, x, *others):  # a loop: all() with a generator takes twice as long
        if t is not None and (t.dtype is not dtype or (grad and t.requires_grad)):
            fit = False
    return fit


class Hot:
    """What the last step was run with, and what that was made of: a loop's next step finds it by identity.

    ``sources`` are tensors that count their writes, and counts only grow: their sum tells whether one was written to.
    """

    __slots__ = ("clock", "config", "key", "rows", "sources", "version")

    def __init__(
        self, key: Any, rows: Any, config: Any, sources: tuple[Tensor, ...], clock: Clock | None = None
    ) -> None:
        self.key, self.rows, self.config, self.sources, self.clock = key, rows, config, sources, clock
        self.version = sum(source._version for source in sources)


class Engine:
    """The options, the tables, the host copy of the timesteps, the noise, the op.

    It refers to no scheduler (the methods that need one are given it), so that a scheduler is freed with its last name.
    Nothing of it is in the config. Shallow copies of a scheduler get an engine of their own that shares the tables;
    deep copies and pickles take its options along.
    """

    rng: Rng = "torch"
    seeds: int | Tensor | None = None
    exact: bool = False

    hot: Hot | None = None
    carried: Carried | None = None
    own: tuple[str, ...] = ("hot", "carried")
    """Attributes that copies do without: what belongs to tensors of this engine's loop, by identity and version."""

    def __init__(self) -> None:
        self.tables = Tables()
        self._clock: Clock | None = None
        self._calls: tuple[Clock | None, int] = (None, -1)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.own}

    # ---------------------------------------------------------------------------------------------- time
    def clock(self, timesteps: Tensor) -> Clock:
        """The host copy of the timesteps."""
        found = self._clock
        if found is None or not found.is_of(timesteps):
            found = self._clock = Clock(timesteps)
        return found

    def call_number(self, timesteps: Tensor) -> int:
        """The number of this call since `set_timesteps`, for streams of noise that no step's number tells apart."""
        clock, (last, count) = self.clock(timesteps), self._calls
        count = count + 1 if last is clock else 0
        self._calls = (clock, count)
        return count

    # ---------------------------------------------------------------------------------------------- noise
    def noise(
        self, like: Tensor, generator: Any, dtype: torch.dtype | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(noise, seeds) of one draw of the shape of ``like``, one of them None: a tensor drawn as the original draws
        it (``dtype`` that of ``like`` by default), or the seeds of noise by address."""
        if self.rng == "torch":
            drawn = randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype or like.dtype)
            return drawn, None
        return None, self.seeds_of(like, generator)

    def seeds_of(self, like: Tensor, generator: Any) -> Tensor:
        """int64 [B]: the seeds that were set, or those of the generators."""
        batch, given = like.shape[0], self.seeds
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
        return self.tables.get(
            ("seeds", job, batch, str(like.device)), lambda: ops.seeds(job, batch, device=like.device)
        )

    # ---------------------------------------------------------------------------------------------- 16 bits
    def widened(self, x: Tensor, run: Any, at: int) -> Tensor:
        """The float32 state that a sample of 16 bits stands for at step ``at`` of a run; see `Carried`."""
        carried = self.carried
        if carried is None or carried.run is not run or carried.at != at:
            return as_dtype(x, torch.float32)
        state = carried.state
        if carried.out.dtype is not x.dtype or state.shape != x.shape or state.device != x.device:
            return as_dtype(x, torch.float32)
        graph = torch.is_grad_enabled() and x.requires_grad
        if x is carried.out and not graph and not x.is_inference() and x._version == carried.writes:
            return state
        if not graph:
            return torch.where(state.to(x.dtype) == x, state, x)
        return unrounded(x, state)

    def carry(self, state: Tensor, out: Tensor, run: Any, at: int) -> None:
        """Keeps the state behind ``out`` for step ``at``."""
        self.carried = Carried(state.detach() if state.requires_grad else state, out, version(out), run, at)

    def start_from(self, x: Tensor, dtype: torch.dtype, run: Any, at: int | None) -> tuple[Tensor, dict[str, Any]]:
        """(the state that the step of a sample starts from, what its op is asked for beside) for results of ``dtype``.

        For 16 bits a float32 state and x' in both, of which `end_with` makes the step's result.
        """
        if dtype not in SIXTEEN or at is None:
            return x, {}
        wants = {"state": torch.float32, "next_copies": 1, "next_dtype": dtype}
        return self.widened(x, run, at) if x.dtype is dtype else as_dtype(x, torch.float32), wants

    def end_with(self, found: Results, wants: dict[str, Any], run: Any, at: int | None) -> Results:
        """(x' as the step returns it, x0, s, None) of what an op gave after `start_from`; x0 and s stay float32."""
        if not wants:
            return found
        assert at is not None
        out, x0, s, narrow = found
        self.carry(out, narrow, run, at + 1)
        return narrow, x0, s, None

    # ---------------------------------------------------------------------------------------------- the op
    def run(
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
    ) -> Results:
        """One `ops.step` in the dtype ``state`` (by default what torch promotes x and m to)."""
        if m is not None and m.shape != x.shape:
            x, m = torch.broadcast_tensors(x, m)
        if state is None:
            state = x.dtype if m is None else promote(x.dtype, m.dtype)
        x = as_dtype(x, state)
        if noise is not None:
            noise = as_dtype(noise if noise.shape == x.shape else noise.expand(x.shape), state)
        if histories:
            histories = tuple(h if h is None else as_dtype(h, state) for h in histories)
        if index is not None:
            table = self.tables.on(table, x.device)
        return ops.step(x, m, None, *histories, table=table, row=row, index=index, noise=noise, seeds=seeds, **wants)

    def run_thresholded(
        self,
        scheduler: DropIn,
        x: Tensor,
        m: Tensor,
        *histories: Tensor | None,
        table: Tensor,
        row: int,
        index: Tensor | None = None,
        **wants: Any,
    ) -> Results:
        """`run` with the original's dynamic thresholding between x0 and x': three fused ops."""
        first, second = self.tables.get(("split", id(table)), lambda: split(table), table)
        estimate = self.run(x, m, table=first, row=row, index=index, state=wants.get("state"))[0]
        x0 = self.threshold(scheduler, estimate)
        out, _, s, following = self.run(x, m, x0, *histories, table=second, row=row, index=index, **wants)
        return out, x0, s, following

    def threshold(self, scheduler: DropIn, x0: Tensor) -> Tensor:
        """Dynamic thresholding (arXiv 2205.11487); the original's own where x0 has a gradient or its maximum is odd."""
        config = scheduler.config
        if x0.requires_grad or not config.sample_max_value >= 1.0:
            return scheduler._threshold_sample(x0)
        return ops.dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)

    def noised(
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

        table = self.tables.get(("noised", str(x.device), *key), build, source)
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


EngineType = TypeVar("EngineType", bound=Engine, covariant=True)
Self = TypeVar("Self", bound="DropIn")


class Attached(Generic[EngineType]):
    """The attribute that is a scheduler's engine: made when it is first asked for, as the constructor is diffusers'."""

    def __init__(self, kind: Callable[[], EngineType]) -> None:
        self._kind = kind

    @overload
    def __get__(self, scheduler: None, owner: Any) -> Attached[EngineType]: ...
    @overload
    def __get__(self, scheduler: DropIn, owner: Any) -> EngineType: ...
    def __get__(self, scheduler: DropIn | None, owner: Any) -> Any:
        return self if scheduler is None else scheduler.__dict__.setdefault("_engine", self._kind())


class DropIn:
    """Goes before the original class: diffkern's options, and copies with an engine of their own."""

    _engine = Attached(Engine)

    # The original's, where it has them.
    config: Any
    _internal_dict: Any
    timesteps: Tensor
    num_inference_steps: Any
    alphas_cumprod: Tensor
    sigmas: Tensor
    step_index: int | None
    begin_index: int | None
    _step_index: Any
    _begin_index: Any
    _init_step_index: Any
    index_for_timestep: Callable[..., int]
    _sigma_to_alpha_sigma_t: Callable[[Tensor], tuple[Tensor, Tensor]]
    _threshold_sample: Callable[[Tensor], Tensor]
    convert_model_output: Callable[..., Tensor]
    model_outputs: list[Any]
    lower_order_nums: int
    is_scale_input_called: bool
    init_noise_sigma: Any
    state_in_first_order: bool
    prev_derivative: Any
    sample: Any
    dt: Any

    def diffkern(
        self: Self, *, rng: Rng | None = None, seeds: int | Tensor | None = None, exact: bool | None = None
    ) -> Self:
        """Set diffkern's options and return the scheduler; what is not given stays.

        ``rng="torch"`` (default) consumes the torch generator exactly as the original does. ``rng="counter"`` draws
        noise by address: ``seeds`` is int64 [B], one a sample, or an integer (`diffkern.seeds` makes the samples' of
        it); without seeds they come from the initial seeds of the ``generator`` given to `step`. ``exact=True`` takes
        the right branch where the original's numerical choice is questionable (docs/compat-diffusers.md lists them).
        """
        engine = self._engine
        if rng is not None:
            if rng not in RNGS:
                raise ValueError(f"rng must be one of {', '.join(RNGS)}, got {rng!r}")
            engine.rng = rng
        if seeds is not None:
            if isinstance(seeds, Tensor) and (seeds.dtype != torch.int64 or seeds.dim() != 1):
                raise ValueError(
                    f"seeds must be an integer or int64 [B], got {seeds.dtype} of shape {list(seeds.shape)}"
                )
            if not isinstance(seeds, Tensor) and as_integer(seeds) is None:
                raise ValueError(f"seeds must be an integer or int64 [B], got {type(seeds).__name__}")
            engine.seeds = seeds
        if exact is not None:
            engine.exact = bool(exact)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along."""
        state = self.__dict__.copy()
        if "_engine" in state:
            state["_engine"] = copy.copy(state["_engine"])
        return state
