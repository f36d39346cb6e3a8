"""The host copy of the training state, from which a checkpoint is written."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from mmalign.model.shards import local


class Staging:
    """Its buffers, as large as this rank's part of the state, are reused by the next copy.

    Pinned if there is a GPU, so that the copy runs at the speed of the bus.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: dict[str, Tensor] = {}
        self.mesh: DeviceMesh | None = None

    def copy(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same values on the host; a DTensor stays a DTensor."""
        for name, tensor in state.items():
            part = local(tensor)
            if name not in self.buffers:
                pinned = self.device.type == "cuda"
                self.buffers[name] = torch.empty_like(part, device="cpu", pin_memory=pinned)
            self.buffers[name].copy_(part, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {name: self._like(self.buffers[name], tensor) for name, tensor in state.items()}

    def _like(self, buffer: Tensor, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return buffer
        if self.mesh is None:
            mesh = tensor.device_mesh
            names = mesh.mesh_dim_names
            # shards on the host need a CPU mesh, or they would be moved to the device
            self.mesh = init_device_mesh("cpu", tuple(mesh.shape), mesh_dim_names=names)
        return DTensor.from_local(
            buffer,
            self.mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
