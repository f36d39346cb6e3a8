"""The whole model: vision tower -> projector -> decoder -> loss, and what each stage trains."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from mmalign_kernels import linear_cross_entropy
from torch import Tensor, nn

from mmalign.batch import PackedBatch
from mmalign.config import ShortcutConfig, TrainConfig
from mmalign.errors import UserError
from mmalign.model.decoder import Decoder
from mmalign.model.lora import LoraLinear, add_lora, merge_lora
from mmalign.model.positions import KeyValues
from mmalign.model.projector import Projector
from mmalign.model.shortcuts import loss_rows, prefix_key_values
from mmalign.model.vision_tower import VisionTower

T = TypeVar("T")


class ImageTokens(Protocol):
    """What the model needs of a tokenizer."""

    image_token_id: int
    im_start_id: int
    im_end_id: int


class Llava(nn.Module):
    """Without tower and projector it is the decoder alone, for text-only training.

    image_token_embeddings (2, hidden_size) exists while stage 1 trains the rows of <im_start> and
    <im_end>: it stands in for these two rows of the frozen embed_tokens. The export merges it.
    """

    def __init__(
        self,
        decoder: Decoder,
        vision_tower: VisionTower | None,
        projector: Projector | None,
        tokenizer: ImageTokens,
        shortcuts: ShortcutConfig = ShortcutConfig(),  # noqa: B008 (frozen)
        prefix_ids: Sequence[int] = (),
    ):
        super().__init__()
        assert (vision_tower is None) == (projector is None)
        self.decoder = decoder
        self.vision_tower = vision_tower
        self.projector = projector
        self.image_token_id = tokenizer.image_token_id
        self.im_start_end_ids = (tokenizer.im_start_id, tokenizer.im_end_id)
        self.shortcuts = shortcuts
        self.follow_prefix(prefix_ids)
        self.register_parameter("image_token_embeddings", None)
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
        """The decoder's normed output, (total_tokens, hidden_size), or of these rows only."""
        return self.decoder(
            batch.input_ids,
            batch.position_ids,
            batch.cu_seqlens,
            batch.max_seqlen,
            image_features=self._image_features(batch),
            image_positions=batch.image_positions,
            projector=self.projector,
            token_rows=self._token_rows(),
            rows=rows,
            prefix=self._prefix(batch.prefix_length),
        )

    def _image_features(self, batch: PackedBatch) -> Tensor | None:
        pixel_values = batch.pixel_values
        if self.vision_tower is None:
            assert len(pixel_values) == 0, "a batch with images needs a vision tower"
            return None
        if len(pixel_values) == 0:  # the tower has nothing to do, the projector stays in the graph
            return self.projector.weight.new_empty(0, self.vision_tower.config.hidden_size)
        return self.vision_tower(pixel_values)

    def follow_prefix(self, token_ids: Sequence[int]) -> None:
        """From now on the rows of a batch with this prefix_length follow these tokens.

        Nothing that learns may reach them (PackedBatch.prefix_length). Their keys and values are
        computed in the next forward pass, and again after set_stage.
        """
        self.prefix_ids, self.prefix = tuple(token_ids), ()

    def _prefix(self, length: int) -> tuple[KeyValues, ...]:
        if length == 0:
            return ()
        assert length == len(self.prefix_ids), "the batch follows another prefix than the model"
        weight = self.decoder.embed_tokens.weight
        if not self.prefix or self.prefix[0].keys.dtype != weight.dtype:
            self.prefix = prefix_key_values(self.decoder, self.prefix_ids)
        return self.prefix

    def _token_rows(self) -> dict[int, Tensor]:
        if self.image_token_embeddings is None:
            return {}
        return dict(zip(self.im_start_end_ids, self.image_token_embeddings, strict=True))

    def with_decoder(self, function: Callable[[Decoder], T]) -> T:
        """function(decoder); where the weights are sharded, as a forward pass that gathers them."""
        return function(self.decoder)

    def set_stage(self, config: TrainConfig) -> None:
        """Marks what config.stage trains (requires_grad); the vision tower never learns.

        pretrain: the projector, and where the template writes <im_start> and <im_end> their two
        rows. finetune: the projector and the decoder, or with config.lora.rank its adapters.
        """
        self.shortcuts, self.prefix = config.shortcuts, ()
        merge_lora(self.decoder)
        self.requires_grad_(False)
        self.merge_image_token_embeddings()
        if self.projector is not None:
            self.projector.requires_grad_(True)
        if config.stage == "pretrain":
            if self.projector is None:
                raise UserError("stage pretrain trains the projector, but this model has none")
            if config.data.use_im_start_end and config.data.template != "plain":
                self._split_image_token_embeddings()
        elif config.lora.rank == 0:
            self.decoder.requires_grad_(True)
        else:
            add_lora(self.decoder, config.lora)
            for module in self.decoder.modules():
                if isinstance(module, LoraLinear):
                    module.lora_a.requires_grad_(True)
                    module.lora_b.requires_grad_(True)
            if config.lora.train_embeddings:
                self.decoder.embed_tokens.requires_grad_(True)
                self.decoder.lm_head.requires_grad_(True)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_projector(self, state: dict[str, Tensor]) -> None:
        """Takes what hf_read.load_projector returns; the two token rows go to embed_tokens."""
        for name in ("weight", "bias"):
            parameter = getattr(self.projector, name)
            if parameter.shape != state[name].shape:
                raise UserError(
                    f"projector {name}: expected shape {tuple(parameter.shape)} for this vision "
                    f"tower and decoder, found {tuple(state[name].shape)}"
                )
            parameter.copy_(state[name])
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
        """Writes the two trained rows, if there are any, into embed_tokens."""
        if self.image_token_embeddings is not None:
            self._write_image_token_rows(self.image_token_embeddings)
            self.image_token_embeddings = None

    @torch.no_grad()
    def _write_image_token_rows(self, rows: Tensor) -> None:
        self._check_vocabulary(*self.im_start_end_ids)
        weight = self.decoder.embed_tokens.weight
        weight[list(self.im_start_end_ids)] = rows.to(weight)
