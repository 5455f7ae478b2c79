// The mask of a detection, given in the cells of its box, as pixels of the image: the rule of predict.py.

/** Of each pixel between 0 and `pixels` the cells that it is read from and their weights, bilinearly at its center. */
function weights(low, high, pixels, cells) {
  return Array.from({ length: pixels }, (_, i) => {
    const at = ((i + 0.5 - low) / Math.max(high - low, 1e-9)) * cells - 0.5;
    const first = Math.floor(at);
    const both = [[first, 1 - (at - first)], [first + 1, at - first]];
    return both.filter(([cell]) => cell >= 0 && cell < cells);
  });
}

/**
 * Probabilities of side x side cells of a box, px of the image -> COCO's uncompressed run lengths {size, counts}: down the
 * columns, first the pixels outside.
 */
export function runLengths(cells, side, [x1, y1, x2, y2], height, width) {
  const rows = weights(y1, y2, height, side);
  const counts = [0];
  let inside = false;
  for (const column of weights(x1, x2, width, side)) {
    for (const row of rows) {
      let value = 0;
      for (const [i, down] of row) for (const [j, right] of column) value += down * right * cells[i * side + j];
      if (value >= 0.5 !== inside) {
        inside = !inside;
        counts.push(0);
      }
      counts[counts.length - 1]++;
    }
  }
  return { size: [height, width], counts };
}

/** Fills the pixels of run lengths with the context's color. */
export function paint(context, { size: [height], counts }) {
  let at = 0;
  counts.forEach((count, run) => {
    const end = at + count;
    while (at < end) {
      const y = at % height;
      const length = Math.min(end - at, height - y);
      if (run % 2) context.fillRect(Math.floor(at / height), y, 1, length);
      at += length;
    }
  });
}
