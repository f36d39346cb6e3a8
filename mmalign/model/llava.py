"""The whole model: vision tower -> projector -> decoder -> loss, and what each stage trains."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from mmalign_kernels import linear_cross_entropy
from torch import Tensor, nn

from mmalign.batch import PackedBatch
from mmalign.config import LoraConfig, ShortcutConfig, Stage
from mmalign.errors import UserError
from mmalign.model.decoder import Decoder
from mmalign.model.lora import LoraLinear, add_lora, merge_lora
from mmalign.model.positions import CachedPositions, KeyValues, PackedPositions
from mmalign.model.projector import AnyProjector, ImageInputs, load_projector_tensors
from mmalign.model.tiles import NEWLINE, Pixels, join_pixels
from mmalign.model.vision_tower import VisionTower

T = TypeVar("T")
ALL_SHORTCUTS = ShortcutConfig()


class ImageTokens(Protocol):
    """What the model needs of a tokenizer."""

    image_token_id: int
    im_start_id: int
    im_end_id: int


class Llava(nn.Module):
    """Without tower and projector it is the decoder alone, for text-only training.

    image_token_embeddings (2, hidden_size) exists while stage 1 trains the rows of <im_start> and
    <im_end>: it replaces these two rows of the frozen embed_tokens. The export merges it.
    image_newline (hidden_size,) exists in LLaVA 1.6, at the end of every line of patches.
    """

    image_newline: nn.Parameter | None

    def __init__(
        self,
        decoder: Decoder,
        vision_tower: VisionTower | None,
        projector: AnyProjector | None,
        tokenizer: ImageTokens,
        shortcuts: ShortcutConfig = ALL_SHORTCUTS,
        prefix_ids: Sequence[int] = (),
    ):
        """prefix_ids: tokens that every sample of a batch with a prefix_length follows.

        Nothing that learns may reach them: they have no rows in the batch, and their keys and
        values are computed once, in the first forward pass after set_trainable.
        """
        super().__init__()
        assert (vision_tower is None) == (projector is None)
        self.decoder = decoder
        self.vision_tower = vision_tower
        self.projector = projector
        self.image_token_id = tokenizer.image_token_id
        self.im_start_end_ids = (tokenizer.im_start_id, tokenizer.im_end_id)
        self.shortcuts = shortcuts
        self.prefix_ids = tuple(prefix_ids)
        self._prefix_cache: tuple[KeyValues, ...] = ()
        self.register_parameter("image_token_embeddings", None)
        self.register_parameter("image_newline", None)
        if vision_tower is not None:
            self._check_vocabulary(self.image_token_id)
            vision_tower.requires_grad_(False)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Sum of the losses of all supervised tokens, an fp32 scalar (not their mean)."""
        rows, target_ids = None, batch.target_ids
        if self.shortcuts.last_layer_rows and batch.num_loss_tokens:
            rows = loss_rows(batch)
            target_ids = target_ids.index_select(0, rows)
        hidden_states = self.hidden_states(batch, rows)
        return linear_cross_entropy(hidden_states, self.decoder.lm_head.weight, target_ids)

    def hidden_states(self, batch: PackedBatch, rows: Tensor | None = None) -> Tensor:
        """The decoder's normed output, (total_tokens, hidden_size), or these rows of it alone."""
        positions = self.decoder.packed_positions(
            batch.position_ids,
            batch.cu_seqlens,
            batch.max_seqlen,
            prefix=self._prefix(batch.prefix_length),
        )
        return self.decoder(batch.input_ids, positions, self._image_inputs(batch), rows)

    def _image_inputs(self, batch: PackedBatch) -> ImageInputs | None:
        num_images = len(batch.pixel_values)
        if self.vision_tower is None or self.projector is None:
            assert num_images == 0, "a batch with images needs a vision tower"
            return None
        if num_images:
            features = self.vision_tower(batch.pixel_values)
        else:  # keeps the projector in the graph
            weight = self.decoder.embed_tokens.weight
            features = weight.new_empty(0, self.vision_tower.config.hidden_size)
        if batch.patch_rows is not None:
            features = features.index_select(0, batch.patch_rows)
        embeddings = self._newlines()
        if self.image_token_embeddings is not None:
            embeddings |= zip(self.im_start_end_ids, self.image_token_embeddings, strict=True)
        return ImageInputs(features, batch.image_positions, self.projector, embeddings)

    def _newlines(self) -> dict[int, Tensor]:
        """Embedding of all image tokens, of which the projector then overwrites the patches."""
        return {} if self.image_newline is None else {self.image_token_id: self.image_newline}

    def image_inputs(self, pictures: Sequence[Pixels], positions: Tensor) -> ImageInputs:
        """Of pictures whose tokens stand, in order, at these positions of a row (num_tokens,).

        positions: on the CPU, so that choosing the patches among them waits for no device.
        """
        tower, projector = self.vision_tower, self.projector
        assert tower is not None and projector is not None
        device = self.decoder.embed_tokens.weight.device
        joined = join_pixels(pictures)
        if isinstance(joined, Tensor):
            return ImageInputs(tower(joined.to(device)), positions.to(device), projector)
        assert self.image_newline is not None, "tiles need image_newline"
        is_patch = joined.rows != NEWLINE
        rows, positions = (x[is_patch].to(device) for x in (joined.rows, positions))
        features = tower(joined.pixels.to(device)).index_select(0, rows)
        return ImageInputs(features, positions, projector, self._newlines())

    def _prefix(self, length: int) -> tuple[KeyValues, ...]:
        if length == 0:
            return ()
        assert length == len(self.prefix_ids), "the batch follows another prefix than the model"
        weight = self.decoder.embed_tokens.weight
        if not self._prefix_cache or self._prefix_cache[0].keys.dtype != weight.dtype:
            self._prefix_cache = prefix_key_values(self.decoder, self.prefix_ids)
        return self._prefix_cache

    def with_decoder(self, function: Callable[[Decoder], T]) -> T:
        """function(decoder); sharded weights are gathered for it as for a forward pass."""
        return function(self.decoder)

    def set_trainable(self, stage: Stage, lora: LoraConfig, train_image_tokens: bool) -> None:
        """Marks what the stage trains (requires_grad); the vision tower never learns.

        pretrain: the projector, and with train_image_tokens the rows of <im_start> and <im_end>.
        finetune: the projector and the decoder with image_newline, or with lora.rank its adapters.
        """
        self._prefix_cache = ()  # the weights may have changed
        merge_lora(self.decoder)
        self.requires_grad_(False)
        self.merge_image_token_embeddings()
        if self.projector is not None:
            self.projector.requires_grad_(True)
        if stage == "pretrain":
            if self.projector is None:
                raise UserError("stage pretrain trains the projector, but this model has none")
            if train_image_tokens:
                self._split_image_token_embeddings()
        elif lora.rank == 0:
            self.decoder.requires_grad_(True)
            if self.image_newline is not None:
                self.image_newline.requires_grad_(True)
        else:
            add_lora(self.decoder, lora)
            for module in self.decoder.modules():
                if isinstance(module, LoraLinear):
                    module.lora_a.requires_grad_(True)
                    module.lora_b.requires_grad_(True)
            if lora.train_embeddings:
                self.decoder.embed_tokens.requires_grad_(True)
                self.decoder.lm_head.requires_grad_(True)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def load_projector(self, state: dict[str, Tensor]) -> None:
        """Takes what hf.load_projector returns; the two token rows go to embed_tokens."""
        assert self.projector is not None, "a text-only model has no projector"
        load_projector_tensors(self.projector, state)
        if "image_token_embeddings" in state:
            self._write_image_token_rows(state["image_token_embeddings"])

    def _check_vocabulary(self, *token_ids: int) -> None:
        vocab_size = self.decoder.config.vocab_size
        if max(token_ids) >= vocab_size:
            raise UserError(
                f"the image tokens have the ids {token_ids}, but the decoder's vocabulary has "
                f"{vocab_size} tokens. Give a decoder with these tokens, and data.use_im_start_end "
                "as in the run that trained the projector."
            )

    def _split_image_token_embeddings(self) -> None:
        self._check_vocabulary(*self.im_start_end_ids)
        if self.decoder.config.tie_word_embeddings:
            raise UserError(
                "this decoder ties lm_head to embed_tokens, so <im_start> and <im_end> cannot "
                "learn without lm_head. Use template plain or use_im_start_end False in stage 1."
            )
        rows = self.decoder.embed_tokens.weight.detach()[list(self.im_start_end_ids)]
        self.image_token_embeddings = nn.Parameter(rows)

    def merge_image_token_embeddings(self) -> None:
        """Writes the two trained rows, if there are any, to embed_tokens."""
        if self.image_token_embeddings is not None:
            self._write_image_token_rows(self.image_token_embeddings)
            self.image_token_embeddings = None

    @torch.no_grad()
    def _write_image_token_rows(self, rows: Tensor) -> None:
        self._check_vocabulary(*self.im_start_end_ids)
        weight = self.decoder.embed_tokens.weight
        expected = (2, weight.shape[1])
        if rows.shape != expected:
            raise UserError(
                f"rows of <im_start> and <im_end>: expected shape {expected} for this decoder, "
                f"found {tuple(rows.shape)}"
            )
        weight[list(self.im_start_end_ids)] = rows.to(weight)


def loss_rows(batch: PackedBatch) -> Tensor:
    """The rows with a target, ascending: (num_loss_tokens,) int64, without a device sync."""
    return torch.nonzero_static(batch.target_ids >= 0, size=batch.num_loss_tokens).squeeze(1)


@torch.no_grad()
def prefix_key_values(decoder: Decoder, token_ids: Sequence[int]) -> tuple[KeyValues, ...]:
    """Keys (rotated) and values, of each layer, of tokens at the start of a sample.

    In stage 1 the tokens before the image meet nothing but frozen weights and each other: these
    values are the same in every sample and step, and none of their gradient reaches the projector.
    """
    weight, length = decoder.embed_tokens.weight, len(token_ids)
    input_ids = torch.tensor(token_ids, device=weight.device)
    position_ids = torch.arange(length, dtype=torch.int32, device=weight.device)
    bounds, one = (torch.tensor([0, n], dtype=torch.int32, device="cpu") for n in (length, 1))
    tables = decoder.rotary.up_to(length)
    tokens = PackedPositions(*tables, position_ids, cu_seqlens=bounds, max_seqlen=length)
    layers = tuple(KeyValues(decoder.config, length, like=weight) for _ in decoder.layers)
    spans = bounds[:1], bounds[1:], one
    decoder(input_ids, [CachedPositions(tokens, *spans, cache) for cache in layers])
    return layers
