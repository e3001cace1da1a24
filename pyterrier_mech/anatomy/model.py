"""The map of a model, and the only place that hooks a module.

Nothing here copies or changes the module. Its own forward runs, with hooks for the length of the run and under a lock,
so that runs in several threads do not meet. Where all parts are exactly what the family describes, and only one token
is read, the last layer is computed for that token alone.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from pyterrier_mech.anatomy.families import Family, family_of
from pyterrier_mech.anatomy.layers import Context, Layer, Pick
from pyterrier_mech.anatomy.plain import why_not_plain
from pyterrier_mech.anatomy.readouts import Readout
from pyterrier_mech.anatomy.sites import PLACES, Place
from pyterrier_mech.units import NEURONS, Site

Edit = Callable[[torch.Tensor], torch.Tensor]
"""From the tensor of a site to what stands in its place."""

Values = dict[Site, torch.Tensor]
Record = Collection[Site] | Mapping[Site, Edit]
"""Sites to record; or, for each, what to keep of its tensor, so that not all of it stays in memory."""

EMBEDDINGS = Site('embeddings', 0)
"""The word embeddings, before positions and norm."""

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_new_lock = threading.Lock()


@dataclass(frozen=True)
class Batch:
    """Inputs of a model.

    Attributes:
        tensors: What the module's forward takes, [rows, tokens] each.
        scored: 1 where a token counts when the sequence is read out [rows, tokens]; not the attention mask.
    """

    tensors: dict[str, torch.Tensor]
    scored: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens."""
        rows, tokens = self.tensors['input_ids'].shape
        return rows, tokens

    def picked(self, pick: Pick) -> Batch:
        """Returns the batch with `pick` applied to every tensor."""
        return Batch({name: pick(tensor) for name, tensor in self.tensors.items()}, pick(self.scored))

    def joined(self, other: Batch) -> Batch:
        """Returns the rows of both, which are equally long."""
        tensors = {name: torch.cat([tensor, other.tensors[name]]) for name, tensor in self.tensors.items()}
        return Batch(tensors, torch.cat([self.scored, other.scored]))

    def repeated(self, count: int) -> Batch:
        """Returns the rows `count` times."""
        return self.picked(lambda tensor: tensor.repeat(count, 1))


@dataclass
class Run:
    """What a run gave.

    Attributes:
        batch: Its inputs.
        hidden: Last hidden states [rows, tokens, d], after the last norm.
        values: The sites that were recorded.
        contexts: What each layer was given beside its input, where it was asked for.
    """

    batch: Batch
    hidden: torch.Tensor
    values: Values
    contexts: list[Context] = field(default_factory=list)

    def rows(self, rows: slice) -> Run:
        """Returns some rows of it."""

        def pick(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[rows]

        return Run(
            self.batch.picked(pick),
            pick(self.hidden),
            {site: pick(value) for site, value in self.values.items()},
            [context.rows(pick) for context in self.contexts],
        )


class _LastLayerReached(Exception):  # noqa: N818 - it is a signal, not an error
    pass


class ModelMap:
    """A Hugging Face encoder or decoder, with a head or without, as a map of sites."""

    def __init__(self, module: Any):
        """Finds the family.

        Raises:
            ValueError: If the model's family is unknown.
        """
        self.module = module
        self.family: Family = family_of(self.base.config.model_type)

    @property
    def base(self) -> Any:
        """The encoder, without a classification head."""
        return self.module.base_model

    @property
    def layers(self) -> list[Layer]:
        """The layers, from the first."""
        return [Layer(layer, self.family) for layer in attrgetter(self.family.layers)(self.base)]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.module.parameters()).dtype

    def lock(self) -> threading.RLock:
        """Returns the lock under which the module runs, the same for all rankers that share it."""
        with _new_lock:
            return _locks.setdefault(self.base, threading.RLock())

    def counts(self, kind: str) -> dict[Site, int]:
        """Returns how many heads (also where the kind is inside heads) or neurons each site of the kind has."""
        return {
            Site(kind, i): layer.n_neurons if kind == NEURONS else layer.n_heads_of(kind)
            for i, layer in enumerate(self.layers)
        }

    def sites(self, kind: str) -> list[Site]:
        """Returns the sites of a kind, from the first layer."""
        return [Site(kind, i) for i in range(len(self.layers))]

    def place(self, site: Site) -> Place:
        """Returns where a site is.

        Raises:
            ValueError: If the kind is unknown.
        """
        if site.kind == EMBEDDINGS.kind:
            return Place(self.base.get_input_embeddings(), 'output')
        if site.kind not in PLACES:
            raise ValueError(f'the kind of a site must be one of {[EMBEDDINGS.kind, *PLACES]}; got {site.kind!r}')
        return PLACES[site.kind](self.layers[site.layer])

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Applies the norm after the last layer, where the family has one."""
        return attrgetter(self.family.final_norm)(self.base)(hidden) if self.family.final_norm else hidden

    def why_not_plain(self) -> str:
        """Returns why the parts of the layers must not be computed with directly, or ''; asked anew at each call."""
        with self.lock():  # or the hooks of a run in another thread would be seen
            return why_not_plain(self.module, self.family, self.layers)

    def version(self) -> tuple[Any, ...]:
        """Returns a value that changes when weights are edited, also by `.data`, replaced or adapted."""
        return tuple(float(part.detach().sum()) for part in self.module.state_dict().values())

    def copied(self) -> Any:
        """Returns a copy of the module, without the hooks of a run in another thread."""
        with self.lock(), torch.inference_mode(False):
            return copy.deepcopy(self.module)

    # -- runs

    def run(
        self,
        batch: Batch,
        *,
        edits: Mapping[Site, Edit] | None = None,
        record: Record = (),
        contexts: bool = False,
    ) -> Run:
        """Runs the base model's own forward, edits some sites, and records some: as they are after their edit.

        Args:
            batch: Inputs.
            edits: What stands in the place of the tensors of some sites.
            record: Sites to record, or what to keep of each.
            contexts: Whether to record what each layer is given beside its input.

        Raises:
            ValueError: If a recorded site is passed more than once, or never.
        """
        run = Run(batch, torch.empty(0), {})
        with self._hooked(run, edits or {}, record, contexts):
            run.hidden = self._forward(batch)
        self._check_passed(run.values, record)
        return run

    def represent(
        self,
        batch: Batch,
        readout: Readout,
        *,
        edits: Mapping[Site, Edit] | None = None,
        record: Record = (),
    ) -> tuple[torch.Tensor, Values]:
        """Returns one vector a sequence [rows, d], and the recorded sites.

        Where a single token is read and the parts are plain, the last layer computes that token alone: its sites then
        have one token a row.
        """
        edits, at = edits or {}, readout.at(batch.scored)
        if at is None or not self._may_stop(edits, record):
            run = self.run(batch, edits=edits, record=record)
            return readout.represent(run.hidden, batch.scored), run.values
        run, last = Run(batch, torch.empty(0), {}), len(self.layers) - 1
        with self._hooked(run, edits, record, contexts=False):
            x, context = self._until(last, batch)
            out = self.layers[last].output(x, context, at)
        after = Site('resid_post', last)
        if after in record:
            run.values[after] = out
        self._check_passed(run.values, record)
        return self.final_norm(out)[:, 0], run.values

    def _may_stop(self, edits: Mapping[Site, Edit], record: Record) -> bool:
        """Whether the last layer may be computed by its parts."""
        last = len(self.layers) - 1
        direct = [site for site in [*edits, *record] if site.layer == last and site != EMBEDDINGS]
        direct = [site for site in direct if site.kind != 'resid_post' or site in edits]
        uniform = all(getattr(edits[site], 'uniform', False) for site in direct if site in edits)
        return uniform and all(self.place(site).rowwise for site in direct) and not self.why_not_plain()

    def _forward(self, batch: Batch) -> torch.Tensor:
        # Decoders would keep the keys and values of every layer.
        options = {'use_cache': False} if self.family.causal else {}
        return self.base(**batch.tensors, **options, return_dict=True).last_hidden_state

    def _until(self, index: int, batch: Batch) -> tuple[torch.Tensor, Context]:
        """Runs the base model's own forward up to a layer; returns that layer's input and context."""
        reached: list[tuple[torch.Tensor, Context]] = []
        place = Place(self.layers[index].module, 'input')

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached.append((place.read(args, kwargs, None), _context(args, kwargs)))
            raise _LastLayerReached

        handle = place.module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._forward(batch)
        except _LastLayerReached:
            pass
        finally:
            handle.remove()
        return reached[0]

    @contextmanager
    def _hooked(self, run: Run, edits: Mapping[Site, Edit], record: Record, contexts: bool) -> Iterator[None]:
        """Adds the hooks of a run for the length of the block; they are gone after an exception too."""
        with self.lock(), ExitStack() as stack:
            if contexts:
                for layer in self.layers:
                    stack.callback(layer.module.register_forward_pre_hook(_note(run.contexts), with_kwargs=True).remove)
            # An edit comes first: a site that is edited and recorded is recorded as edited.
            for site, edit in edits.items():
                stack.callback(_hook(self.place(site), edit).remove)
            for site in record:
                kept = record[site] if isinstance(record, Mapping) else None
                stack.callback(_hook(self.place(site), _keep(run.values, site, kept)).remove)
            yield

    def _check_passed(self, values: Values, record: Record) -> None:
        for site in record:
            if site not in values:
                raise _passed(site, 'not at all')


def _keep(values: Values, site: Site, kept: Edit | None) -> Edit:
    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if site in values:
            raise _passed(site, 'more than once')
        if torch.is_grad_enabled() and not tensor.requires_grad:
            # A layer without heads has outputs of no width, which come from nowhere.
            tensor = tensor.detach().requires_grad_()
        values[site] = tensor if kept is None else kept(tensor)
        return tensor

    return keep


def _passed(site: Site, how: str) -> ValueError:
    return ValueError(
        f'a forward run must pass {site.name} exactly once; it was passed {how}: the description of the family does '
        'not fit, or the module works in chunks (set config.chunk_size_feed_forward to 0)'
    )


def _note(contexts: list[Context]) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        contexts.append(_context(args, kwargs))

    return note


def _context(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Context:
    mask = kwargs.get('attention_mask', args[1] if len(args) > 1 else None)
    return Context(mask, kwargs.get('position_embeddings'))


def _hook(place: Place, edit: Edit) -> Any:
    """Passes the tensor of a place through `edit` in every forward; returns the handle of the hook."""

    def pre(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = place.read(args, kwargs, None)
        edited = edit(tensor)
        if edited is tensor:
            return None
        return ((edited, *args[1:]), kwargs) if args else ((), {**kwargs, 'hidden_states': edited})

    def post(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tensor = place.read((), {}, output)
        edited = edit(tensor)
        # A share that gradients are asked for must be what the module goes on with.
        if edited is tensor and (place.share[1] == 1 or not torch.is_grad_enabled()):
            return None
        return place.written(output, edited)

    if place.end == 'input':
        return place.module.register_forward_pre_hook(pre, with_kwargs=True)
    return place.module.register_forward_hook(post)


def first_position(config: Any) -> int:
    """Returns the number that a model of this configuration gives to its first position."""
    return config.pad_token_id + 1 if family_of(config.model_type).positions_after_padding else 0
