// The page: a model and a picture, chosen, dropped, or named in the address (?model=URL&picture=URL&conf=0.3).
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { detect } from "./detect.js";
import { paint } from "./masks.js";
import { readMetadata } from "./metadata.js";

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need a cross-origin isolated page

const element = (id) => document.getElementById(id);
const [status, result, canvas, drop] = ["status", "result", "canvas", "drop"].map(element);
let model = null;
let picture = null;

function say(state, text) {
  status.dataset.state = state;
  status.textContent = text;
}

async function useModel(bytes) {
  say("busy", "Loading the model ...");
  const metadata = readMetadata(bytes);
  const session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  model = { metadata, session };
  await show();
}

async function usePicture(blob) {
  picture = await createImageBitmap(blob);
  await show();
}

async function show() {
  if (!model || !picture) {
    say("idle", model ? "Drop a picture." : "Choose a model.");
    return;
  }
  say("busy", "Detecting ...");
  canvas.width = picture.width;
  canvas.height = picture.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  const image = context.getImageData(0, 0, picture.width, picture.height);
  const conf = Math.max(Number(element("conf").value), model.metadata.nms ? model.metadata.conf : 0);
  const started = performance.now();
  const found = await detect(ort, model.session, model.metadata, image, conf);
  draw(context, found);
  canvas.hidden = result.hidden = false;
  result.textContent = JSON.stringify(found, null, 1);
  say("done", `${found.length} detections in ${Math.round(performance.now() - started)} ms`);
}

function draw(context, found) {
  const line = Math.max(2, Math.round(Math.min(canvas.width, canvas.height) / 200));
  context.lineWidth = line;
  context.font = `${6 * line}px system-ui, sans-serif`;
  context.textBaseline = "top";
  for (const { box, label, name, score, mask } of [...found].reverse()) {
    const [x1, y1, x2, y2] = box;
    const colour = `hsl(${(label * 222.5) % 360} 85% 42%)`;
    if (mask) {
      context.fillStyle = colour;
      context.globalAlpha = 0.5;
      paint(context, mask);
      context.globalAlpha = 1;
    }
    const caption = `${name} ${Math.round(100 * score)}`;
    const top = Math.max(y1 - 8 * line, 0);
    context.strokeStyle = context.fillStyle = colour;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    context.fillRect(x1, top, context.measureText(caption).width + 2 * line, 8 * line);
    context.fillStyle = "white";
    context.fillText(caption, x1 + line, top + line);
  }
}

const orSay = (action) => (...args) => action(...args).catch((error) => say("error", error.message));
const bytesOf = async (blob) => new Uint8Array(await blob.arrayBuffer());
async function fetched(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} cannot be loaded (${answer.status})`);
  return answer.blob();
}

element("model").addEventListener("change", orSay(async (e) => useModel(await bytesOf(e.target.files[0]))));
element("picture").addEventListener("change", orSay(async (e) => usePicture(e.target.files[0])));
element("conf").addEventListener("change", orSay(show));
drop.addEventListener("dragover", (e) => {
  e.preventDefault();
  drop.classList.add("over");
});
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", orSay(async (e) => {
  e.preventDefault();
  drop.classList.remove("over");
  await usePicture(e.dataTransfer.files[0]);
}));
await orSay(async () => {
  const asked = new URLSearchParams(location.search);
  if (asked.has("conf")) element("conf").value = asked.get("conf");
  if (asked.has("model")) await useModel(await bytesOf(await fetched(asked.get("model"))));
  if (asked.has("picture")) await usePicture(await fetched(asked.get("picture")));
})();
