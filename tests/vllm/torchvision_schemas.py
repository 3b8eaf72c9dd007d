"""Lets PyPI's torchvision be imported beside a CPU build of torch: its operators, built for CUDA, do not load there.

Only names and signatures of two operators are declared, just before torchvision is imported; nothing calls them here.
"""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.cuda.is_available():
                self.library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sys.torchvision_schemas = self.library  # it is undone once nothing refers to it
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
