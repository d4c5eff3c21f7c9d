"""The network. Start with `alexnet.py`, which reads as figure 2 of the paper.

It imports config and ops, and never torch.distributed: how a column reaches its peers is the
link's business.
"""
