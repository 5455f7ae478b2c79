// Opens the page in headless Chromium, chooses a model, drops a picture, prints the detections as JSON:
//     node drop.mjs URL MODEL.onnx PICTURE [SCREENSHOT.png]      (CHROMIUM names the browser; default /usr/bin/chromium)
import { readFile } from "node:fs/promises";
import { basename } from "node:path";
import { chromium } from "playwright-core";

const [url, model, picture, screenshot] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
  ],
});
try {
  const page = await browser.newPage();
  await page.goto(url);
  await page.setInputFiles("#model", model);
  await page.waitForFunction(() => document.getElementById("status").textContent === "Drop a picture.");
  const content = (await readFile(picture)).toString("base64");
  const dropped = await page.evaluateHandle(
    ([content, name]) => {
      const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], name));
      return data;
    },
    [content, basename(picture)],
  );
  await page.dispatchEvent("#drop", "drop", { dataTransfer: dropped });
  await page.waitForSelector('#status[data-state="done"], #status[data-state="error"]');
  if (screenshot) await page.screenshot({ path: screenshot, fullPage: true });
  const [state, text] = await page.$eval("#status", (e) => [e.dataset.state, e.textContent]);
  if (state === "error") throw new Error(text);
  console.log(await page.$eval("#result", (e) => e.textContent));
} finally {
  await browser.close();
}
