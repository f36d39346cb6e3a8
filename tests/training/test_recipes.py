"""The recipes hold the numbers of the paper's released runs."""

from mmalign.recipes import RECIPES


def test_rows_of_the_recipe():
    _, pretrain = RECIPES["pretrain-7b"]
    _, finetune = RECIPES["finetune-7b"]
    assert (pretrain.optimizer.learning_rate, pretrain.global_batch_size) == (2e-3, 128)
    assert (finetune.optimizer.learning_rate, finetune.global_batch_size) == (2e-5, 32)
    for config in (pretrain, finetune):
        assert config.optimizer.warmup_ratio == 0.03 and config.optimizer.weight_decay == 0.0
        assert config.data.max_length == 2048 and config.data.use_im_start_end
        assert config.precision == "bf16"
    _, lora = RECIPES["finetune-7b-lora"]
    assert (lora.lora.rank, lora.lora.alpha, lora.lora.dropout) == (64, 16.0, 0.05)
    assert RECIPES["finetune-7b-text-only"][1].data.text_only
