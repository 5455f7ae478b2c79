// A picture into the network's input, its outputs into detections: the rule of predict.py.
import { decode } from "./head_maps.js";
import { runLengths } from "./masks.js";

/** Where in `from` pixels each of `to` pixels lies: bilinear, pixel centres at half. */
function steps(from, to) {
  return Array.from({ length: to }, (_, i) => {
    const at = Math.min(Math.max(((i + 0.5) * from) / to - 0.5, 0), from - 1);
    const first = Math.floor(at);
    return [first, Math.min(first + 1, from - 1), at - first];
  });
}

/** ImageData -> planes R, G, B (Float32Array, 0..255) of the input with the picture at its top left, and the scale. */
export function letterbox(image, { height, width, padValue }) {
  const scale = Math.min(height / image.height, width / image.width);
  const newWidth = Math.max(1, Math.floor(image.width * scale));
  const newHeight = Math.max(1, Math.floor(image.height * scale));
  const area = height * width;
  const planes = new Float32Array(3 * area);
  padValue.forEach((value, c) => planes.fill(value, c * area, (c + 1) * area));
  const columns = steps(image.width, newWidth);
  const rows = steps(image.height, newHeight);
  const { data } = image;
  for (let y = 0; y < newHeight; y++) {
    const [top, bottom, v] = rows[y];
    for (let x = 0; x < newWidth; x++) {
      const [left, right, h] = columns[x];
      for (let c = 0; c < 3; c++) {
        const at = (row, column) => data[4 * (row * image.width + column) + c];
        const upper = at(top, left) * (1 - h) + at(top, right) * h;
        const lower = at(bottom, left) * (1 - h) + at(bottom, right) * h;
        planes[c * area + y * width + x] = Math.round(upper * (1 - v) + lower * v);
      }
    }
  }
  return { planes, scale };
}

function overlap(a, b) {
  const w = Math.max(Math.min(a[2], b[2]) - Math.max(a[0], b[0]), 0);
  const h = Math.max(Math.min(a[3], b[3]) - Math.max(a[1], b[1]), 0);
  const either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h;
  return (w * h) / Math.max(either, 1e-9);
}

/** How many of the locations each feature level has. */
function levelSizes(locations, { height, width, strides, perCell }) {
  if (perCell === 0) return [locations];
  const sizes = strides.map((s) => Math.ceil(height / s) * Math.ceil(width / s) * perCell);
  if (sizes.reduce((a, b) => a + b, 0) !== locations)
    throw new Error("the file has not the locations that its metadata promises");
  return sizes;
}

/** What goes into the suppression: of each location the best class, or every class and the best pairs of each level. */
export function choose(boxes, scores, metadata, conf) {
  const { names, pairsPerLevel } = metadata;
  const locations = boxes.length / 4;
  const rowOf = (i) => scores.subarray(i * names.length, (i + 1) * names.length);
  const pair = (i, label) => ({ box: Array.from(boxes.subarray(4 * i, 4 * i + 4)), score: rowOf(i)[label], label });
  const found = [];
  if (pairsPerLevel === null) {
    for (let i = 0; i < locations; i++) {
      const row = rowOf(i);
      const label = row.reduce((best, score, k) => (score > row[best] ? k : best), 0);
      if (row[label] >= conf) found.push(pair(i, label));
    }
    return found;
  }
  let i = 0;
  for (const size of levelSizes(locations, metadata)) {
    const level = [];
    for (const end = i + size; i < end; i++)
      rowOf(i).forEach((score, label) => score >= conf && level.push(pair(i, label)));
    level.sort((a, b) => b.score - a.score);
    for (const one of level.slice(0, pairsPerLevel)) found.push(one);
  }
  return found;
}

/** Of overlapping boxes of one class the best. */
export function suppress(found, { iou, maxDet }) {
  found.sort((a, b) => b.score - a.score);
  const kept = [];
  for (const d of found) {
    if (kept.length === maxDet) break;
    if (!kept.some((k) => k.label === d.label && overlap(k.box, d.box) > iou)) kept.push(d);
  }
  return kept;
}

/**
 * Runs a session of onnxruntime-web on ImageData -> [{box: [x1, y1, x2, y2] px of the image, score, label, name}], and
 * mask: {size, counts} of each where the file gives masks.
 */
export async function detect(ort, session, metadata, image, conf) {
  const { planes, scale } = letterbox(image, metadata);
  const input = new ort.Tensor("float32", planes, [1, 3, metadata.height, metadata.width]);
  const out = await session.run({ images: input });
  let found;
  if (metadata.nms) {
    const count = Number(out.counts.data[0]);
    found = Array.from({ length: count }, (_, i) => ({
      box: Array.from(out.boxes.data.subarray(4 * i, 4 * i + 4)),
      score: out.scores.data[i],
      label: Number(out.labels.data[i]),
      cells: out.masks && out.masks.data.subarray(i * out.masks.dims[2] ** 2, (i + 1) * out.masks.dims[2] ** 2),
    })).filter((d) => d.score >= conf);
  } else {
    const { boxes, scores } = metadata.headMaps
      ? decode(out, metadata)
      : { boxes: out.boxes.data, scores: out.scores.data };
    found = suppress(choose(boxes, scores, metadata, conf), metadata);
  }
  const limits = [image.width, image.height, image.width, image.height];
  return found.map(({ cells, ...d }) => ({
    ...d,
    box: d.box.map((v, i) => Math.min(Math.max(v / scale, 0), limits[i])),
    name: metadata.names[d.label],
    ...(cells && {
      mask: runLengths(cells, out.masks.dims[2], d.box.map((v) => v / scale), image.height, image.width),
    }),
  }));
}
