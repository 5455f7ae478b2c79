// Raw head outputs into boxes and scores: the rule of predict.py.

const sigmoid = (x) => 1 / (1 + Math.exp(-x));

/** Mean of a distribution over 0 .. n - 1, of n logits. */
function expected(logits) {
  const largest = Math.max(...logits);
  const shares = logits.map((v) => Math.exp(v - largest));
  const sum = shares.reduce((a, b) => a + b, 0);
  return shares.reduce((mean, share, i) => mean + (i * share) / sum, 0);
}

/** A box code around a location (x, y) px -> [x1, y1, x2, y2] px. */
function boxOf(code, [x, y], anchor, { unit }, head) {
  if (head.box_code === "distances" || head.box_code === "distributions") {
    const { bins } = head;
    const [left, top, right, bottom] = bins
      ? [0, 1, 2, 3].map((side) => expected(code.slice(side * bins, (side + 1) * bins)))
      : code;
    return [x - left * unit, y - top * unit, x + right * unit, y + bottom * unit];
  }
  let centerX, centerY, width, height;
  if (head.box_code === "cells") {
    [centerX, centerY] = [x + (code[0] - 0.5) * unit, y + (code[1] - 0.5) * unit];
    [width, height] = [Math.exp(code[2]) * unit, Math.exp(code[3]) * unit];
  } else {
    const [dx, dy, dw, dh] = code.map((v, i) => v * head.deviations[i]);
    const [anchorWidth, anchorHeight] = [anchor[2] - anchor[0], anchor[3] - anchor[1]];
    const scale = (v) => Math.exp(Math.min(Math.max(v, -head.largest_log), head.largest_log));
    [centerX, centerY] = [x + (anchor[0] + anchor[2]) / 2 + dx * anchorWidth, y + (anchor[1] + anchor[3]) / 2 + dy * anchorHeight];
    [width, height] = [scale(dw) * anchorWidth, scale(dh) * anchorHeight];
  }
  return [centerX - width / 2, centerY - height / 2, centerX + width / 2, centerY + height / 2];
}

/** Tensors of one image by name -> {boxes: Float32Array (A, 4) px of the input, scores: Float32Array (A, K)}. */
export function decode(outputs, { headMaps: head, names, height, width }) {
  const boxes = [];
  const scores = [];
  for (const level of head.levels) {
    const n = Math.max(level.anchors.length, 1);
    const [h, w] = [Math.ceil(height / level.stride), Math.ceil(width / level.stride)];
    const tensor = (name, channels) => {
      const { data, dims } = outputs[name];
      if (dims.join() !== [1, n * channels, h, w].join())
        throw new Error(`${name} has the shape ${dims}, not ${[1, n * channels, h, w]}`);
      return (k, channel, cell) => data[(k * channels + channel) * h * w + cell];
    };
    const channels = 4 * (head.bins ?? 1);
    const [classes, code] = [tensor(level.classes, names.length), tensor(level.boxes, channels)];
    const quality = head.score === "class" ? null : tensor(level.quality, 1);
    const [down, right] =
      head.step === "stride" ? [level.stride, level.stride] : [Math.floor(height / h), Math.floor(width / w)];
    for (let cell = 0; cell < h * w; cell++) {
      const point = [((cell % w) + head.offset) * right, (Math.floor(cell / w) + head.offset) * down];
      for (let k = 0; k < n; k++) {
        const values = Array.from({ length: channels }, (_, i) => code(k, i, cell));
        boxes.push(...boxOf(values, point, level.anchors[k], level, head));
        const factor = quality ? sigmoid(quality(k, 0, cell)) : 1;
        for (let label = 0; label < names.length; label++) {
          const score = sigmoid(classes(k, label, cell)) * factor;
          scores.push(head.score === "root" ? Math.sqrt(score) : score);
        }
      }
    }
  }
  return { boxes: Float32Array.from(boxes), scores: Float32Array.from(scores) };
}
