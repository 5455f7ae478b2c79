// The metadata of an ONNX file. onnxruntime-web does not give it, so it is read from the file: a protobuf message whose
// field 14 holds entries of key (field 1) and value (field 2).

const LENGTH_DELIMITED = 2;
const METADATA = 14;

function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const kind = key % 8;
    if (kind === LENGTH_DELIMITED) {
      const length = varint();
      yield [Math.floor(key / 8), bytes.subarray(at, at + length)];
      at += length;
    } else if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else throw new Error("this is not an ONNX file");
  }
}

/** Uint8Array of a file -> {names, height, width, padValue, nms, conf, iou, maxDet, pairsPerLevel, perCell, strides, headMaps}. */
export function readMetadata(bytes) {
  const text = new TextDecoder();
  const found = {};
  for (const [field, content] of fields(bytes)) {
    if (field !== METADATA) continue;
    const entry = Object.fromEntries([...fields(content)].map(([f, c]) => [f, text.decode(c)]));
    found[entry[1]] = entry[2];
  }
  const get = (key, otherwise) => {
    if (!(key in found) && otherwise !== undefined) return otherwise;
    if (!(key in found)) throw new Error(`the file has no metadata '${key}': yoloxkd export did not write it`);
    return JSON.parse(found[key]);
  };
  const [height, width] = get("input_size");
  return {
    names: get("names"), height, width, padValue: get("pad_value"), nms: get("nms"),
    conf: get("conf"), iou: get("iou"), maxDet: get("max_det"), strides: get("strides"),
    // not there in files of an older version
    pairsPerLevel: get("pairs_per_level", null), perCell: get("predictions_per_cell", 1),
    headMaps: get("head_maps", null), // of files of raw outputs alone
  };
}
