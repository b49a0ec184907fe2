"""Generation of images from masks: prompts, region attention, sampling and label filters.

Why rectified attention and not a control branch: the mask decides which text tokens a pixel can
attend to, so only an adapter of the frozen UNet has to be trained, and any class that has a word
can be placed.

Why the processors share a context: what changes between batches (masks, number of unconditional
rows, cached text) reaches them through it and not through the UNet's arguments. The UNet is called
as in stock diffusers, emits no warnings and can be compiled.

Why the processors are not modules: the shares that mix plain and rectified attention belong to the
control, so they never appear among the weights of the base.

Why two softmaxes: the plain one is the same kernel call as in the stock pipeline, over the whole
batch. A share of exactly one, unconditional rows and batches without regions therefore give the
stock result bit for bit.
"""
