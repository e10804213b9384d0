"""What torch is asked to do: every operation that reaches the dispatcher, and this package's frames at a call."""

import sys
from pathlib import Path

from torch.utils._python_dispatch import TorchDispatchMode

import mopo_kernels

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")
HEAD = ("linear_logprob", "linear_policy_loss", "token_logprob")  # what an operator does inside is not seen
PACKAGE = str(Path(mopo_kernels.__file__).parent)


class Operations(TorchDispatchMode):
    """Lists the operations that are run under it."""

    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.all.append(operation)
        return operation(*args, **(kwargs or {}))

    def named(self, *names):
        return [x for x in self.all if x._schema.name.split("::")[1] in names]

    @property
    def work(self):
        """Those that are no views."""
        return [x for x in self.all if not x.is_view]

    @property
    def products(self):
        """Matrix products, and operators of a head."""
        return self.named(*PRODUCTS, *HEAD)

    @property
    def read_backs(self):
        return self.named("_local_scalar_dense")


def frames_at(function, name):
    """The files and names of this package's frames that were alive when `function` first called the C function."""
    found = []

    def profile(frame, event, called):
        if event != "c_call" or called.__name__ != name or found:
            return
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                found.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
            frame = frame.f_back

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(before)
    return found[::-1]
