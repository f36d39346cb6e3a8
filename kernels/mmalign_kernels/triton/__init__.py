"""The operations in Triton, each in the file of its operation.

common.py: helpers of all kernels. launch.py, launch_attention.py: tiles, warps and stages; they
import no triton, so costs/ reads the same constants. matmul.py: tiled products; logits.py and
lm_head_gradients.py: the language-model head. attention_*.py: the parts of flash attention.
tensor_table.py: one launch for many tensors. rotation.py: RoPE on separate heads, for the attention
libraries.
"""
