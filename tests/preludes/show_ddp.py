"""Print how DistributedDataParallel is made, and whether it broadcasts buffers before a pass."""

from torch.nn.parallel import DistributedDataParallel


def init(self, *args, real=DistributedDataParallel.__init__, **kwargs):
    print("DDP", kwargs)
    real(self, *args, **kwargs)


def sync_buffers(self):
    print("BUFFERS", self.forward_sync_buffers)


DistributedDataParallel.__init__ = init
DistributedDataParallel._sync_buffers = sync_buffers
