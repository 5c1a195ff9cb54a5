"""Sparse decoding in the models of Hugging Face transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._library import integer
from ..paged_select_attention import paged_select_attention
from ..quest_decoder import QuestDecoder

try:
    import torch
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
    )
    from transformers.cache_utils import DynamicSlidingWindowLayer
except ImportError as error:
    raise ImportError(
        "select_attn_ops.integrations.transformers needs torch and transformers >= 5.24: "
        "pip install torch 'transformers>=5.24,<6'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["QuestCache", "register"]

_LAYER = "quest_layer"
"""Keyword by which a cache layer hands itself to the attention function."""

# What transformers' models may ask of attention that sdpa leaves out without a word, and what it
# does but the operators do not.
IGNORED_BY_SDPA = ("s_aux", "sinks", "softcap")
ONLY_BY_SDPA = ("position_bias",)


def register(name: str = "quest") -> None:
    """Make sparse decoding known to transformers, for ``model.set_attn_implementation(name)``.

    Without a `QuestCache`, a model that uses it does what it does with ``"sdpa"``; attention sinks
    and soft caps, which that leaves out, raise NotImplementedError.

    Parameters
    ----------
    name : str
        What to call it.
    """
    AttentionInterface.register(name, _attention)
    AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])


class QuestCache(Cache):  # type: ignore[misc]
    """A KV cache for transformers, of which a decode step reads the blocks that matter.

    It goes to ``model.generate(..., cache=cache)``, or to the model's own call, after
    `register` and ``model.set_attn_implementation("quest")``. A call with several tokens per
    sequence, such as that for the prompt, attends to everything; a call with one token per
    sequence attends, per layer and KV head, to `k` blocks, in this order: that being filled, the
    newest full ones, the first, and those with the highest scores. With a `k` of less than
    ``recent_blocks + 3`` nothing is left for scores.

    Layers with a sliding window keep transformers' own cache and attention.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The model's ``config``.
    budget : int, optional
        Tokens to attend to, at most: ``k = budget // block_size``. Default: 2048, or a block if
        that is longer, unless `k` is given.
    k : int, optional
        Blocks to attend to, those that are forced included, in place of `budget`.
    block_size : int
        Tokens per block.
    recent_blocks : int
        Full blocks, the newest ones of a sequence, that are among the `k` as far as they fit.
    dense_layers : int
        Layers, the first ones of the model, that attend to everything.
    dense_below : int, optional
        Tokens per sequence up to which a step attends to everything in every layer. Default: the
        budget, which makes no difference to the result.
    max_length : int, optional
        Tokens per sequence to allocate memory for at once. Default: as many as there are and a
        quarter more, whenever they need more.

    Raises
    ------
    ValueError
        If a number is out of range, both `budget` and `k` are given, or every layer has a sliding
        window.
    NotImplementedError
        If a layer is neither full attention nor one with a sliding window, as in models with
        linear attention, or the model is an encoder-decoder.

    Notes
    -----
    *Batches* may be padded on the left, as `generate` needs it. Padding is not stored. Masks that
    hide anything else raise NotImplementedError; in a step on another device than the CPU, where
    reading it would make the host wait, a mask is taken to hide the padding that is known.

    *Continuing.* A later call with the same sequences and more tokens goes on where the last one
    ended. For other sequences call `reset`, which keeps the memory, or make a new cache.

    *Beams, assistants.* Beam search and assisted decoding work. The former copies the cache in
    every step, the latter attends to everything when it verifies candidates.

    *Results* with ``k * block_size`` above the length are those of ``"sdpa"`` within rounding.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from select_attn_ops.integrations.transformers import QuestCache, register
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
    ...     num_attention_heads=4, num_key_value_heads=2, eos_token_id=None,
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> register()
    >>> model.set_attn_implementation("quest")
    >>> cache = QuestCache(model.config, budget=64)
    >>> prompt = torch.randint(1, 64, (1, 200))
    >>> tokens = model.generate(
    ...     prompt, cache=cache, max_new_tokens=20, do_sample=False, pad_token_id=0
    ... )
    >>> tokens.shape
    torch.Size([1, 220])
    """

    def __init__(
        self,
        config: Any,
        *,
        budget: int | None = None,
        k: int | None = None,
        block_size: int = 16,
        recent_blocks: int = 1,
        dense_layers: int = 2,
        dense_below: int | None = None,
        max_length: int | None = None,
    ) -> None:
        if budget is not None and k is not None:
            raise ValueError("expected either budget or k, got both")
        _check_at_least(1, block_size=block_size)
        _check_at_least(block_size, budget=budget)
        _check_at_least(1, k=k, max_length=max_length)
        _check_at_least(
            0, recent_blocks=recent_blocks, dense_layers=dense_layers, dense_below=dense_below
        )
        if k is None:
            k = (max(2048, block_size) if budget is None else budget) // block_size
        if getattr(config, "is_encoder_decoder", False):
            raise NotImplementedError(
                f"the model must be a decoder, got the encoder-decoder {config.model_type}"
            )
        sequences = _Sequences()
        layers = DynamicCache(config=config).layers  # of the kinds that the model needs
        for i, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[i] = _QuestLayer(
                    sequences,
                    None if i < dense_layers else k,
                    block_size=block_size,
                    recent_blocks=recent_blocks,
                    dense_below=k * block_size if dense_below is None else dense_below,
                    max_length=max_length or 1,
                )
            elif type(layer) is not DynamicSlidingWindowLayer:
                raise NotImplementedError(
                    f"layers must be full or sliding-window attention, got {type(layer).__name__} "
                    f"for layer {i}"
                )
        if not any(isinstance(layer, _QuestLayer) for layer in layers):
            raise ValueError("expected a layer without a sliding window, got none")
        super().__init__(layers=layers)
        self._sequences = sequences
        sequences.first = self._full_layer()

    def reset(self) -> None:
        """Forget all sequences, and keep the memory."""
        super().reset()
        self._sequences.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every sequence.

        Parameters
        ----------
        tokens_to_remove : int
            Their number, negated, as transformers wants it.

        Raises
        ------
        ValueError
            If it is positive, or more than a sequence holds.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must not be positive, got {tokens_to_remove}")
        held = self._sequences.shortest(self._full_layer().get_seq_length())
        if -tokens_to_remove > held:
            raise ValueError(f"tokens_to_remove must be at least -{held}, got {tokens_to_remove}")
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put sequence ``beam_idx[i]`` in the place of sequence `i`."""
        super().reorder_cache(beam_idx)
        self._sequences.take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Put `repeats` copies of every sequence in its place."""
        super().batch_repeat_interleave(repeats)
        every = torch.arange(self._sequences.count)
        self._sequences.take(every.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, and no others."""
        super().batch_select_indices(indices)
        self._sequences.take(torch.arange(self._sequences.count)[indices.cpu()])

    def _full_layer(self) -> _QuestLayer:
        return next(layer for layer in self.layers if isinstance(layer, _QuestLayer))


class _Sequences:
    """What all layers of a cache share: how much of each sequence is padding, and no token.

    The number of tokens with padding, `total`, is the same for all sequences. Layers differ in it
    during a call, each having seen the new tokens or not.
    """

    def __init__(self) -> None:
        self.first: _QuestLayer | None = None
        self._past = 0
        self.reset()

    @property
    def count(self) -> int:
        return len(self._pads)

    @property
    def pads(self) -> list[int] | None:
        """Padding on the left of each sequence; None if there is none at all."""
        return self._pads if any(self._pads) else None

    def reset(self) -> None:
        self._set([])

    def take(self, indices: Tensor) -> None:
        self._set([self._pads[i] for i in indices.tolist()] if self._pads else [])

    def _set(self, pads: list[int]) -> None:
        self._pads = pads
        self._pads_on: dict[torch.device, Tensor] = {}
        self._lens: dict[tuple[torch.device, int], Tensor] = {}

    def shortest(self, total: int) -> int:
        return total - max(self._pads, default=0)

    def longest(self, total: int) -> int:
        return total - min(self._pads)

    def lens(self, total: int, device: torch.device) -> Tensor:
        """Tokens of each sequence, ``[B]``, int32."""
        key = (device, total)
        if key not in self._lens:
            if device not in self._pads_on:  # a transfer, for which the host waits
                pads = torch.tensor(self._pads, dtype=torch.int32, device=device)
                self._pads_on[device] = pads
            self._lens[key] = (total - self._pads_on[device]).clamp(min=0)
        return self._lens[key]

    def see(
        self, layer: _QuestLayer, mask: Tensor | None, batch: int, past: int, total: int
    ) -> None:
        """Begin a call with its first layer: learn the padding, or check that it is what it was.

        The other layers have the same mask, and are checked to hold as many tokens.
        """
        if layer is not self.first:
            if past != self._past:
                raise RuntimeError(
                    f"layers must hold equally many tokens, got {self._past} and {past}: an "
                    "earlier call did not end, reset the cache"
                )
            return
        self._past = past
        if past > 0 and batch != self.count:
            raise ValueError(f"expected the {self.count} sequences of the cache, got {batch}")
        self._lens.clear()
        pads = [0] * batch
        if mask is not None:
            _check_mask(mask, batch, total)
            is_known = total == past + 1 and past > max(self._pads, default=past)
            if is_known and mask.device.type != "cpu":
                return  # the host would wait for the device in every step
            pads = _padding(mask, batch, total)
        if past > 0:
            # A sequence without a token so far may turn out to have more padding.
            same = (a == b or (a == past and b > a) for a, b in zip(self._pads, pads, strict=True))
            if not all(same):
                raise ValueError("attention_mask must hide the padding of earlier calls, no more")
        if pads != self._pads:
            self._set(pads)


class _QuestLayer(CacheLayerMixin):  # type: ignore[misc]
    """The paged cache of one layer, and attention over it.

    Attention writes the new tokens, because only it is given the mask that says which are
    padding. `update` hands the layer to it through the keyword arguments that models pass on from
    their cache to attention for such ends.

    Sequence `b` has the KV blocks from ``b * columns`` on, `columns` of them.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        sequences: _Sequences,
        k: int | None,
        *,
        block_size: int,
        recent_blocks: int,
        dense_below: int,
        max_length: int,
    ) -> None:
        super().__init__()
        self._sequences = sequences
        self._k = k
        self._block_size = block_size
        self._options: dict[str, Any] = {
            "recent_blocks": recent_blocks,
            "dense_below": dense_below,
        }
        self._least_columns = -(-max_length // block_size)
        self._total = 0
        self._given: Tensor | None = None
        self.decoder: QuestDecoder | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: memory is allocated when the number of tokens without padding is known."""

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        kwargs: dict[str, Any] | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        if kwargs is None:
            raise NotImplementedError(
                "attention must pass its kwargs to cache.update, which this model's does not"
            )
        if self._given is not None:
            raise RuntimeError(
                "expected attention to take what the cache gave it in the last call: does the "
                'model have set_attn_implementation("quest")? If so, reset the cache'
            )
        self._given = key_states
        kwargs[_LAYER] = self
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._total

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._total + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._total, self._given = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        # Metadata of a block that is no longer full is not used, and written anew when it fills.
        self._total += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(torch.arange(self._sequences.count).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(torch.arange(self._sequences.count)[indices.cpu()])

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        scaling: float | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        given, self._given = self._given, None
        if key is not given:
            raise NotImplementedError(
                "keys must go from the cache to attention as they are, which this model changes"
            )
        if key.shape != value.shape:
            raise NotImplementedError(
                f"values must have the shape of the keys, got {list(value.shape)} and "
                f"{list(key.shape)}"
            )
        refuse(ONLY_BY_SDPA, kwargs)
        past, total = self._total, self._total + key.shape[2]
        is_step = past > 0 and key.shape[2] == 1
        if is_step and (dropout or (torch.is_grad_enabled() and query.requires_grad)):
            raise NotImplementedError(
                "decoding has no gradients and no dropout: use model.eval() and torch.no_grad()"
            )
        self._sequences.see(self, mask, len(key), past, total)
        self._reserve(key, query.shape[1], scaling)
        self._write(self._k_cache, key, past, total)
        self._write(self._v_cache, value, past, total)
        self._total = total
        if is_step:
            return self._step(query[:, :, 0].detach())[:, None], None
        if self.decoder is not None:
            device = key.device
            self.decoder.update(
                self._tables,
                self._sequences.lens(total, device),
                self._sequences.lens(past, device),
            )
        if past > 0:
            key, value = self._read(self._k_cache), self._read(self._v_cache)
        return _sdpa(module, query, key, value, mask, dropout, scaling, **kwargs)

    def _step(self, query: Tensor) -> Tensor:
        if query.stride(-1) != 1:
            query = query.contiguous()
        lens = self._sequences.lens(self._total, query.device)
        longest = self._sequences.longest(self._total)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if self.decoder is not None:
            return self.decoder.step(query, self._tables, lens, max_seq_len=longest, out=out)
        numbers = torch.arange(
            -(-longest // self._block_size), dtype=torch.int32, device=query.device
        )
        exists = numbers * self._block_size < lens[:, None]
        every = torch.where(exists, numbers, -1)[:, None].expand(-1, self._k_cache.shape[2], -1)
        result: Tensor = paged_select_attention(
            query,
            self._k_cache,
            self._v_cache,
            self._tables,
            lens,
            every,
            scale=self._scaling,
            out=out,
        )
        return result

    def _reserve(self, like: Tensor, num_heads: int, scaling: float | None) -> None:
        """Have memory for the tokens of this call."""
        batch = self._sequences.count
        if self._total == 0 and not self._fits(batch, like, num_heads, scaling):
            shape = (0, self._block_size, *like.shape[1::2])
            self._k_cache, self._v_cache = like.new_empty(shape), like.new_empty(shape)
            self._num_heads, self._scaling = num_heads, scaling
            self._batch, self._columns, self.decoder = batch, 0, None
            self.is_initialized = True
        longest = self._sequences.longest(self._total + like.shape[2])
        columns = -(-longest // self._block_size) or 1
        if columns <= self._columns:
            return
        if columns > self._least_columns:
            columns += columns // 4
        columns, old = max(columns, self._least_columns), self._columns

        def grown(pool: Tensor) -> Tensor:
            shape = pool.shape[1:]
            new = pool.new_empty(batch, columns, *shape)
            new[:, :old] = pool.view(batch, old, *shape)
            return new.flatten(0, 1)

        self._move(grown, batch, columns)

    def _fits(self, batch: int, like: Tensor, num_heads: int, scaling: float | None) -> bool:
        return (
            self.is_initialized
            and batch == self._batch
            and like.shape[1::2] == self._k_cache.shape[2:]
            and (num_heads, scaling) == (self._num_heads, self._scaling)
            and like.dtype == self._k_cache.dtype
            and like.device == self._k_cache.device
        )

    def _take(self, indices: Tensor) -> None:
        if self._total == 0:
            return
        indices = indices.to(self._k_cache.device)

        def taken(pool: Tensor) -> Tensor:
            by_sequence = pool.view(self._batch, self._columns, *pool.shape[1:])
            return by_sequence.index_select(0, indices).flatten(0, 1)

        self._move(taken, len(indices), self._columns)

    def _move(self, moved: Callable[[Tensor], Tensor], batch: int, columns: int) -> None:
        """Put blocks elsewhere, and their metadata with them."""
        self._k_cache = moved(self._k_cache)
        self._v_cache = moved(self._v_cache)
        before = self.decoder
        if self._k is not None:
            self.decoder = QuestDecoder(
                self._k_cache,
                self._v_cache,
                num_heads=self._num_heads,
                k=self._k,
                max_batch=batch,
                max_blocks=columns,
                scale=self._scaling,
                **self._options,
            )
            if before is not None:
                self.decoder.maxblocks.copy_(moved(before.maxblocks))
                self.decoder.minblocks.copy_(moved(before.minblocks))
        blocks = torch.arange(batch * columns, dtype=torch.int32, device=self._k_cache.device)
        self._tables = blocks.view(batch, columns)
        self._batch, self._columns = batch, columns

    def _by_sequence(self, cache: Tensor) -> Tensor:
        """``[B, tokens, N, D]``, a view."""
        return cache.view(self._batch, self._columns * self._block_size, *cache.shape[2:])

    def _write(self, cache: Tensor, new: Tensor, past: int, total: int) -> None:
        """Append ``[B, N, tokens, D]``, without what is padding."""
        tokens, pads = self._by_sequence(cache), self._sequences.pads
        new = new.detach().transpose(1, 2)
        if pads is None:
            tokens[:, past:total] = new
        elif new.shape[1] == 1:
            last = self._sequences.lens(total, cache.device).long() - 1
            tokens[torch.arange(self._batch, device=cache.device), last] = new[:, 0]
        else:
            for row, added, pad in zip(tokens, new, pads, strict=True):
                start = max(past, pad)
                row[start - pad : total - pad] = added[start - past :]

    def _read(self, cache: Tensor) -> Tensor:
        """All tokens as ``[B, N, total, D]``, zeros for padding."""
        tokens, pads = self._by_sequence(cache), self._sequences.pads
        if pads is None:
            return tokens[:, : self._total].transpose(1, 2)
        padded = cache.new_zeros(self._batch, self._total, *cache.shape[2:])
        for row, stored, pad in zip(padded, tokens, pads, strict=True):
            row[pad:] = stored[: self._total - pad]
        return padded.transpose(1, 2)


def _check_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got bool")
        if value is not None and integer(name, value) < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_mask(mask: Tensor, batch: int, total: int) -> None:
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        raise NotImplementedError(
            f"attention_mask must be boolean [{batch}, 1, *, {total}], "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    if mask.shape[0] not in (1, batch) or mask.shape[3] != total:
        raise ValueError(
            f"attention_mask must be boolean [{batch}, 1, *, {total}], got {list(mask.shape)}"
        )


def _padding(mask: Tensor, batch: int, total: int) -> list[int]:
    """What a mask hides on the left of each sequence."""
    visible = mask[:, 0, -1].expand(batch, -1)
    pads = total - visible.sum(-1)
    if not torch.equal(visible, torch.arange(total, device=mask.device) >= pads[:, None]):
        raise NotImplementedError(
            "attention_mask must hide nothing but padding on the left of a sequence"
        )
    return [int(pad) for pad in pads.tolist()]


def refuse(names: tuple[str, ...], arguments: dict[str, Any]) -> None:
    """Raise NotImplementedError if a model asks attention for one of these."""
    for name in names:
        if arguments.get(name) is not None:
            raise NotImplementedError(f"attention with {name} is not supported")


def _sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    result: tuple[Tensor, None] = AttentionInterface()["sdpa"](
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return result


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers' models call it."""
    refuse(IGNORED_BY_SDPA, kwargs)
    layer: _QuestLayer | None = kwargs.pop(_LAYER, None)
    attend = _sdpa if layer is None else layer.attend
    return attend(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
