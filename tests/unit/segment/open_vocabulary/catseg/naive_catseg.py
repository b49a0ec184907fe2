"""A naive implementation of CAT-Seg from the published method, with loops where they are clearer.

It works on an official state dict, shares no code with loraseg and does not use attention, norms,
resizing or transposed convolution of torch. It is slow and meant for small sizes.
"""

import math

import torch

S = "sem_seg_head.predictor."


def linear(sd, name, x):
    return x @ sd[f"{name}.weight"].T + sd[f"{name}.bias"]


def layer_norm(sd, name, x):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * sd[f"{name}.weight"] + sd[f"{name}.bias"]


def unit(x):
    return x / torch.sqrt((x**2).sum(-1, keepdim=True))


def softmax(x):
    e = torch.exp(x - x.max(-1, keepdim=True).values.detach())
    return e / e.sum(-1, keepdim=True)


def conv(sd, name, x, pad):
    """Convolve one image (c, h, w) tap by tap."""
    weight = sd[f"{name}.weight"]
    out, _, k, _ = weight.shape
    h, w = x.shape[1:]
    wide = torch.zeros(x.shape[0], h + 2 * pad, w + 2 * pad, dtype=x.dtype)
    wide[:, pad : pad + h, pad : pad + w] = x
    y = torch.zeros(out, h, w, dtype=x.dtype)
    for i in range(k):
        for j in range(k):
            y = y + torch.einsum("oc,chw->ohw", weight[:, :, i, j], wide[:, i : i + h, j : j + w])
    if f"{name}.bias" in sd:
        y = y + sd[f"{name}.bias"][:, None, None]
    return y


def conv_transpose(sd, name, x):
    """Transposed convolution with kernel = stride: every pixel becomes a k x k square."""
    weight = sd[f"{name}.weight"]
    k = weight.shape[-1]
    squares = torch.einsum("chw,cokl->ohkwl", x, weight)
    y = squares.reshape(weight.shape[1], x.shape[1] * k, x.shape[2] * k)
    return y + sd[f"{name}.bias"][:, None, None]


def group_norm(sd, name, x):
    channels = x.shape[0]
    groups = max(1, channels // 16)
    parts = []
    for part in x.chunk(groups):
        variance = ((part - part.mean()) ** 2).mean()
        parts.append((part - part.mean()) / torch.sqrt(variance + 1e-5))
    y = torch.cat(parts)
    return y * sd[f"{name}.weight"][:, None, None] + sd[f"{name}.bias"][:, None, None]


def resize_matrix(n_out, n_in, kind):
    """Return the matrix of a one-dimensional resize: "linear", "corners" or "cubic"."""
    matrix = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        if kind == "corners":
            position = i * (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
        else:
            position = (i + 0.5) * n_in / n_out - 0.5
        if kind == "linear":
            position = max(position, 0.0)
        base = math.floor(position)
        t = position - base
        if kind == "cubic":
            a = -0.75
            near = [(a + 2) * d**3 - (a + 3) * d**2 + 1 for d in (t, 1 - t)]
            far = [a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a for d in (1 + t, 2 - t)]
            taps = [(base - 1, far[0]), (base, near[0]), (base + 1, near[1]), (base + 2, far[1])]
        else:
            taps = [(base, 1 - t), (base + 1, t)]
        for index, weight in taps:
            matrix[i, min(max(index, 0), n_in - 1)] += weight
    return matrix


def resize(x, h, w, kind):
    rows = resize_matrix(h, x.shape[-2], kind).to(x.dtype)
    columns = resize_matrix(w, x.shape[-1], kind).to(x.dtype)
    return rows @ x @ columns.T


def clip_qkv(sd, name, x):
    biases = sd[f"{name}.in_proj_bias"].chunk(3)
    return [
        x @ sd[f"{name}.{part}_proj_weight"].T + bias
        for part, bias in zip("qkv", biases, strict=True)
    ]


def clip_mlp(sd, name, x):
    y = linear(sd, f"{name}.c_fc", x)
    return linear(sd, f"{name}.c_proj", y / (1 + torch.exp(-1.702 * y)))


def clip_block(sd, name, x, heads, causal):
    q, k, v = clip_qkv(sd, f"{name}.attn", layer_norm(sd, f"{name}.ln_1", x))
    size = q.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        if causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        outputs.append(softmax(scores) @ v[:, part])
    x = x + linear(sd, f"{name}.attn.out_proj", torch.cat(outputs, -1))
    return x + clip_mlp(sd, f"{name}.mlp", layer_norm(sd, f"{name}.ln_2", x))


def last_block(sd, name, x):
    _, _, v = clip_qkv(sd, f"{name}.attn", layer_norm(sd, f"{name}.ln_1", x))
    v = linear(sd, f"{name}.attn.out_proj", v)
    v = v + x[0]
    return v + clip_mlp(sd, f"{name}.mlp", layer_norm(sd, f"{name}.ln_2", v))


def depth(sd, prefix):
    return 1 + max(int(k[len(prefix) :].split(".")[0]) for k in sd if k.startswith(prefix))


def encode_text(sd, ids, heads):
    clip = f"{S}clip_model."
    rows = []
    for row in ids:
        x = sd[f"{clip}token_embedding.weight"][row] + sd[f"{clip}positional_embedding"][: len(row)]
        for i in range(depth(sd, f"{clip}transformer.resblocks.")):
            x = clip_block(sd, f"{clip}transformer.resblocks.{i}", x, heads, True)
        end = max(range(len(row)), key=lambda j: (int(row[j]), -j))
        rows.append(unit(layer_norm(sd, f"{clip}ln_final", x)[end] @ sd[f"{clip}text_projection"]))
    return torch.stack(rows)


def encode_image(sd, image, heads, guidance_blocks):
    """Return (d, g, g) features and the two (w, g, g) guidance outputs of one image."""
    v = f"{S}clip_model.visual."
    kernel = sd[f"{v}conv1.weight"]
    patch = kernel.shape[-1]
    g = image.shape[-1] // patch
    tokens = [sd[f"{v}class_embedding"]]
    for i in range(g):
        for j in range(g):
            patch_pixels = image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append((kernel * patch_pixels).sum((1, 2, 3)))
    table = sd[f"{v}positional_embedding"]
    side = math.isqrt(len(table) - 1)
    square = table[1:].T.reshape(-1, side, side)
    square = resize(square, g, g, "cubic")
    positions = torch.cat([table[:1], square.reshape(len(square), g * g).T])
    x = layer_norm(sd, f"{v}ln_pre", torch.stack(tokens) + positions)
    count = depth(sd, f"{v}transformer.resblocks.")
    outputs = []
    for i in range(count - 1):
        x = clip_block(sd, f"{v}transformer.resblocks.{i}", x, heads, False)
        outputs.append(x)
    outputs.append(last_block(sd, f"{v}transformer.resblocks.{count - 1}", x))
    features = layer_norm(sd, f"{v}ln_post", outputs[-1]) @ sd[f"{v}proj"]

    def to_map(rows):
        return rows[1:].T.reshape(-1, g, g)

    return to_map(features), [to_map(outputs[i]) for i in guidance_blocks]


def swin_attention(sd, name, x, a, heads, cells, same):
    """Attend among the listed cells; x (g, g, c), a (g, g, ca); -100 where regions differ."""
    tokens = torch.stack([x[r, c] for r, c in cells])
    guided = torch.cat([tokens, torch.stack([a[r, c] for r, c in cells])], -1)
    q, k = linear(sd, f"{name}.q", guided), linear(sd, f"{name}.k", guided)
    v = linear(sd, f"{name}.v", tokens)
    size = q.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = (q[:, part] * size**-0.5) @ k[:, part].T
        if same is not None:
            scores = scores + torch.where(same, 0.0, -100.0)
        outputs.append(softmax(scores) @ v[:, part])
    return linear(sd, f"{name}.proj", torch.cat(outputs, -1))


def swin_block(sd, name, x, a, heads, window, shift):
    g = x.shape[0]
    normed = layer_norm(sd, f"{name}.norm1", x)
    mixed = [[None] * g for _ in range(g)]
    for top in range(0, g, window):
        for left in range(0, g, window):
            # Position (i, j) of the rolled map holds cell (i + shift, j + shift) modulo g. Tokens
            # moved across the border are not neighbours of the others.
            positions = [
                (i, j) for i in range(top, top + window) for j in range(left, left + window)
            ]
            cells = [((i + shift) % g, (j + shift) % g) for i, j in positions]
            wrapped = [(i + shift >= g, j + shift >= g) for i, j in positions]
            same = None
            if shift:
                same = torch.tensor([[p == q for q in wrapped] for p in wrapped])
            rows = swin_attention(sd, f"{name}.attn", normed, a, heads, cells, same)
            for (r, c), row in zip(cells, rows, strict=True):
                mixed[r][c] = row
    x = x + torch.stack([torch.stack(row) for row in mixed])
    y = linear(sd, f"{name}.mlp.fc1", layer_norm(sd, f"{name}.norm2", x))
    y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    return x + linear(sd, f"{name}.mlp.fc2", y)


def class_attention(sd, name, x, text, heads):
    """Linear attention over the rows of one position; x (L, c) normed, text (L, ct)."""
    length = len(x)
    guided = torch.cat([x, text], -1)
    q, k, v = (linear(sd, f"{name}.{p}", y) for p, y in (("q", guided), ("k", guided), ("v", x)))

    def feature(y):
        return torch.where(y > 0, y, torch.exp(y.clamp(max=0)) - 1) + 1

    q, k = feature(q), feature(k)
    size = q.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        affinity = q[:, part] @ k[:, part].T
        mixed = affinity @ (v[:, part] / length)
        outputs.append(mixed / (affinity.sum(-1, keepdim=True) + 1e-6) * length)
    return torch.cat(outputs, -1)


def class_layer(sd, name, x, text, heads, pad_len, pool):
    """Return the output (T, g, g, c) for x (T, g, g, c) and text (T, ct)."""
    count, g = x.shape[:2]
    small = g // pool
    y = [[None] * small for _ in range(small)]
    for i in range(small):
        for j in range(small):
            rows = slice(i * pool, (i + 1) * pool)
            columns = slice(j * pool, (j + 1) * pool)
            z = x[:, rows, columns].mean((1, 2))
            words = text
            if count < pad_len:
                extra = pad_len - count
                z = torch.cat([z, sd[f"{name}.padding_tokens"][0].expand(extra, -1)])
                words = torch.cat([text, sd[f"{name}.padding_guidance"][0].expand(extra, -1)])
            z = z + class_attention(
                sd, f"{name}.attention", layer_norm(sd, f"{name}.norm1", z), words, heads
            )
            hidden = linear(sd, f"{name}.MLP.0", layer_norm(sd, f"{name}.norm2", z)).clamp(min=0)
            z = z + linear(sd, f"{name}.MLP.2", hidden)
            y[i][j] = z[:count]
    pooled = torch.stack([torch.stack(row) for row in y])
    wide = resize(pooled.permute(2, 3, 0, 1), g, g, "corners")
    return x + wide.permute(0, 2, 3, 1)


def up(sd, name, x, guide):
    x = torch.cat([conv_transpose(sd, f"{name}.up", x), guide])
    for i in (0, 3):
        x = conv(sd, f"{name}.conv.double_conv.{i}", x, 1)
        x = group_norm(sd, f"{name}.conv.double_conv.{i + 1}", x).clamp(min=0)
    return x


def aggregate(sd, features, text, guides, heads, window, pad_len, pool):
    """Return the logits (T, 4g, 4g) of one image; text (T, P, d)."""
    t = f"{S}transformer."
    g = features.shape[-1]
    unit_features = unit(features.permute(1, 2, 0))
    total, prompts = text.shape[:2]
    cost = torch.stack(
        [
            torch.stack([(unit_features * unit(text[c, p])).sum(-1) for p in range(prompts)])
            for c in range(total)
        ]
    )
    kept = list(range(total))
    if total > pad_len:
        best = [float(cost[c].detach().max()) for c in range(total)]
        kept = sorted(range(total), key=lambda c: -best[c])[:pad_len]
        text = unit(text)
    appearance = conv(sd, f"{t}guidance_projection.0", features, 1).clamp(min=0).permute(1, 2, 0)
    words = torch.stack(
        [linear(sd, f"{t}text_guidance_projection.0", unit(text[c].mean(0))) for c in kept]
    ).clamp(min=0)
    x = torch.stack([conv(sd, f"{t}conv1", cost[c], 3).permute(1, 2, 0) for c in kept])
    for i in range(depth(sd, f"{t}layers.")):
        swin = f"{t}layers.{i}.swin_block"
        a = layer_norm(sd, f"{swin}.guidance_norm", appearance)
        w, shift = (g, 0) if window >= g else (window, window // 2)
        rows = []
        for class_map in x:
            shifted = swin_block(sd, f"{swin}.block_1", class_map, a, heads, w, 0)
            rows.append(swin_block(sd, f"{swin}.block_2", shifted, a, heads, w, shift))
        x = class_layer(
            sd, f"{t}layers.{i}.attention", torch.stack(rows), words, heads, pad_len, pool
        )
    guide1 = conv(sd, f"{t}decoder_guidance_projection.0.0", guides[0], 1).clamp(min=0)
    guide2 = conv(sd, f"{t}decoder_guidance_projection.1.0", guides[1], 1).clamp(min=0)
    out = [torch.full((4 * g, 4 * g), -100.0, dtype=x.dtype)] * total
    for c, class_map in zip(kept, x, strict=True):
        y = up(sd, f"{t}decoder1", class_map.permute(2, 0, 1), guide1)
        y = up(sd, f"{t}decoder2", y, guide2)
        out[c] = conv(sd, f"{t}head", y, 1)[0]
    return torch.stack(out)


def forward(sd, images, text, *, clip_heads, heads, window, pad_len, pool, guidance_blocks):
    """Return logits (B, T, 4g, 4g); images normalised, text (T, P, d)."""
    logits = []
    for image in images:
        features, taps = encode_image(sd, image, clip_heads, guidance_blocks)
        guides = [conv_transpose(sd, f"upsample{i + 1}", tap) for i, tap in enumerate(taps)]
        logits.append(aggregate(sd, features, text, guides, heads, window, pad_len, pool))
    return torch.stack(logits)


def loss(logits, label, ignore, masked):
    """Return the mean over images, classes and pixels, computed pixel by pixel."""
    total, count = 0.0, 0
    for image, ids in zip(logits, label, strict=True):
        maps = resize(image, *ids.shape, "linear")
        for r in range(ids.shape[0]):
            for c in range(ids.shape[1]):
                if masked and int(ids[r, c]) == ignore:
                    continue
                for k in range(len(maps)):
                    p = 1 / (1 + torch.exp(-maps[k, r, c]))
                    total = total - torch.log(p if int(ids[r, c]) == k else 1 - p)
                    count += 1
    return total / count
