"""What a checkpoint asks for, whatever the budgets: by its configuration, its headers, and a pass without data."""

from __future__ import annotations

from cache.errors import CheckpointError
from offload.checkpoint.mapping import Checkpoint
from offload.checkpoint.skeleton import expert_parameters
from offload.costs.precision import title
from offload.decide.fallbacks.base import Fallback
from offload.decide.slices import slice_shares
from offload.layers.embedding import EmbeddingOnDisk
from offload.layers.linear import DenseLinears
from offload.plan.footprint import weigh
from offload.plan.needs import Needs, SliceNeeds
from offload.plan.work import Work, dense_bytes_read, seen_top_k
from offload.store.plain import precision_of
from offload.store.precisions import PrecisionStore
from offload.store.readers import READERS, readers_here
from offload.system import memory


def needs_of(
    name: str,
    checkpoint: Checkpoint,
    context: int,
    store: PrecisionStore,
    fallback: Fallback,
    linears: DenseLinears | None,
    embedding: EmbeddingOnDisk | None,
    *,
    divides: bool,
) -> Needs:
    """What the model called `name` needs at `context` tokens, its experts in `store`.

    `linears` and `embedding` stand in the skeleton already. The CPU computes experts beside an accelerator where a
    scheduler `divides` layers. Side effect: a forward pass of the skeleton, which has no data.
    """
    experts = checkpoint.experts
    with seen_top_k(checkpoint.skeleton, [layer.path for layer in experts.layers]) as top_k:
        weight = weigh(checkpoint.skeleton, context)
    if top_k and top_k[0] < 1:
        raise CheckpointError(f"{name}: its config.json cannot be used: a token would go to {top_k[0]} experts")
    shared = store.readers_per_place
    readers = max(readers_here(store.expert_bytes // experts.total_experts), shared * READERS)
    return Needs(
        model=name,
        context=context,
        max_context=max_context(checkpoint),
        dense_bytes=weight.dense_bytes,
        kv_bytes=weight.kv_bytes,
        workspace_bytes={n: nbytes + store.scratch_bytes for n, nbytes in weight.workspace_bytes.items()},
        layers=len(experts.layers),
        experts=experts.total_experts,
        slices=_slices(store, fallback),
        expert_bytes=store.expert_bytes,
        reader_bytes=store.reader_bytes,
        readers=readers,
        places=readers // shared,
        process_bytes=memory.resident_bytes(),
        beside_bytes=_beside_bytes(checkpoint, top_k[0]) if divides and top_k else 0,
        dense_note=_dense_note(linears, embedding),
        work=_work(checkpoint, store, linears, top_k[0]) if top_k else None,
    )


def max_context(checkpoint: Checkpoint) -> int | None:
    """The most tokens that the model was made for, if its configuration says it."""
    tokens = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    return tokens if isinstance(tokens, int) and tokens > 0 else None  # some say -1 where they set no limit


def _beside_bytes(checkpoint: Checkpoint, top_k: int) -> int:
    """Of a token: its row for every expert it goes to, what they give, and one expert's activations in between."""
    module = checkpoint.skeleton.get_submodule(checkpoint.experts.layers[0].path)
    sides = [side for parameter in expert_parameters(module).values() for side in parameter.shape[1:]]
    hidden = checkpoint.config.get_text_config().hidden_size
    return int((2 * top_k * hidden + 3 * max(sides)) * checkpoint.dtype.itemsize)


def _dense_note(linears: DenseLinears | None, embedding: EmbeddingOnDisk | None) -> str:
    note = "all that is no expert" if embedding is None else "all but experts and token embeddings"
    return note if linears is None else f"{note}, {len(linears.names)} linear layers at {linears.form.title}"


def _work(checkpoint: Checkpoint, store: PrecisionStore, linears: DenseLinears | None, top_k: int) -> Work:
    experts = checkpoint.experts
    layer_bytes, head_bytes = dense_bytes_read(checkpoint.skeleton, [layer.path for layer in experts.layers])
    return Work(
        experts_per_layer=experts.num_experts,
        top_k=top_k,
        precision=title(store.precisions[0].name) if len(store.precisions) == 1 else None,
        dense_precision=precision_of(checkpoint.dtype) if linears is None else linears.form.title,
        record_bytes=store.expert_bytes // experts.total_experts,
        dense_layer_bytes=layer_bytes,
        dense_pass_bytes=head_bytes,
        packs=store.packs,
    )


def _slices(store: PrecisionStore, fallback: Fallback) -> tuple[SliceNeeds, ...]:
    """What each slice gets of the memory for experts."""
    precisions = [precision.slices for precision in store.precisions]
    shares = slice_shares(precisions, store.slot_bytes, fallback.low_share)
    return tuple(
        SliceNeeds(each.name, each.slot_bytes, share, whole=fallback.keeps_low and i in precisions[-1])
        for i, (each, share) in enumerate(zip(store.slices, shares, strict=True))
    )
