"""Images from masks: prompts, region attention and sampling.

Why rectified attention and not a control branch: the mask decides which text tokens a pixel may
read, so nothing but an adapter of the frozen UNet has to be trained, and any class that has a
word can be placed.

Why a context that the processors share: what changes from batch to batch (masks, the rows without
a condition, the constant text) is handed to them beside the UNet's own arguments. So the UNet is
called as in stock diffusers, warns of nothing, and can be compiled.

Why processors that are no modules: the shares that mix plain and rectified attention belong to the
control, so that they never appear among the weights of the base.

Why two softmaxes: the plain one is the very kernel of the stock pipeline, over the whole batch. A
share of exactly one, rows without a condition and batches without regions therefore give the stock
result bit for bit.
"""
