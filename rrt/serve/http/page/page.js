"use strict";

// Text of the model, and names from the server, come into the page as text alone: never as HTML.

const COLOURS = 5;
const STATS_MS = 1000;
const POLICIES = [
  // name, start of its value
  ["never", null],
  ["verify", null],
  ["auto", null],
  ["static", 0],
  ["confidence", 0.9],
  ["margin", 0.5],
  ["entropy", 0.5],
  ["calibrated", 0.9],
];

const EXIT_HINT = "By which loop the tokens of the last ten seconds were given, of all requests.";
const VERIFIED_HINT = "From which loop on the tokens of the last ten seconds stood, of all requests.";

const $ = (id) => document.getElementById(id);
let controller = null;
let verifies = false;

function headers() {
  const sent = { "Content-Type": "application/json" };
  if ($("key").value) sent.Authorization = `Bearer ${$("key").value}`;
  return sent;
}

async function request(path, body, signal) {
  const options = { headers: headers(), signal };
  if (body !== undefined) Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  const response = await fetch(path, options);
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw new Error(answer?.error?.message ?? `status ${response.status}`);
  }
  return response;
}

// The data of each event of a stream.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

function addText(text, loop) {
  const output = $("output");
  const isAtEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
  const last = output.lastElementChild;
  if (last && last.dataset.loop === String(loop)) {
    last.append(text);
  } else {
    const span = document.createElement("span");
    span.className = `loop-${loop % COLOURS}`;
    span.dataset.loop = loop;
    span.title = `loop ${loop}`;
    span.append(text);
    output.append(span);
  }
  if (isAtEnd) output.scrollTop = output.scrollHeight;
}

async function generate() {
  const isChat = $("chat").checked;
  const prompt = $("prompt").value;
  const body = {
    stream: true,
    max_tokens: Number($("max-tokens").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
    ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  $("output").replaceChildren();
  $("error").textContent = "";
  $("summary").textContent = "";
  $("output").setAttribute("aria-busy", "true");
  $("send").disabled = true;
  $("stop").disabled = false;
  controller = new AbortController();
  const began = performance.now();
  let count = 0;
  let loops = 0;
  let reason = "";
  try {
    const response = await request(isChat ? "v1/chat/completions" : "v1/completions", body, controller.signal);
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (!choice) continue;
      const depths = verifies ? choice.rrt.agreed_loops : choice.rrt.exit_loops;
      const text = isChat ? choice.delta.content : choice.text;
      if (text) addText(text, depths.at(-1) ?? 0);
      count += depths.length;
      for (const depth of depths) loops += depth + 1;
      reason = choice.finish_reason ?? reason;
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped by you";
    else $("error").textContent = error.message;
  } finally {
    const seconds = (performance.now() - began) / 1000;
    if (count) {
      const mean = (loops / count).toFixed(2);
      $("summary").textContent =
        `${count} tokens in ${seconds.toFixed(1)} s (${(count / seconds).toFixed(1)} per second), ` +
        `${mean} loops a token, end: ${reason || "error"}`;
    }
    $("output").setAttribute("aria-busy", "false");
    $("send").disabled = false;
    const hadFocus = document.activeElement === $("stop");
    $("stop").disabled = true;
    if (hadFocus) $("send").focus();
    controller = null;
  }
}

function showHistogram(counts) {
  const histogram = $("histogram");
  while (histogram.children.length < counts.length) {
    const loop = histogram.children.length;
    const bar = document.createElement("div");
    bar.className = `bar loop-${loop % COLOURS}`;
    bar.setAttribute("role", "listitem");
    for (const name of ["name", "track", "count"]) {
      const part = document.createElement("div");
      part.className = name;
      bar.append(part);
    }
    bar.children[0].textContent = `loop ${loop}`;
    bar.children[1].append(document.createElement("div"));
    bar.children[1].firstChild.className = "fill";
    histogram.append(bar);
  }
  const total = counts.reduce((sum, count) => sum + count, 0);
  counts.forEach((count, loop) => {
    const share = total ? (100 * count) / total : 0;
    const bar = histogram.children[loop];
    bar.children[1].firstChild.style.width = `${share}%`;
    bar.children[2].textContent = `${share.toFixed(0)} %, ${count}`;
  });
}

function showPolicy(policy) {
  const [name, value] = policy.split(":");
  if ($("policy").dataset.current === policy) return;
  $("policy").dataset.current = policy;
  if (![...$("policy").options].some((option) => option.value === name)) addPolicy(name);
  $("policy").value = name;
  $("threshold").value = value ?? "";
  showThreshold(value);
  $("policy-state").textContent = `in force: ${policy}`;
}

function addPolicy(name) {
  const option = document.createElement("option");
  option.textContent = option.value = name;
  $("policy").append(option);
}

function showThreshold(value) {
  const start = new Map(POLICIES).get($("policy").value) ?? null;
  $("threshold-label").hidden = start === null;
  $("threshold").required = start !== null;
  if (start !== null) $("threshold").value = value ?? start;
}

async function applyPolicy() {
  const hasValue = !$("threshold-label").hidden;
  const policy = $("policy").value + (hasValue ? `:${$("threshold").value}` : "");
  $("policy-state").textContent = "waits for the requests under way";
  try {
    await request("rrt/policy", { policy });
    $("policy").dataset.current = "";
    await refresh();
  } catch (error) {
    $("policy-state").textContent = error.message;
  }
}

async function refresh() {
  try {
    const stats = await (await request("rrt/stats")).json();
    document.title = $("model").textContent = stats.model;
    $("state").textContent = `${stats.num_loops} ${stats.num_loops === 1 ? "loop" : "loops"}`;
    verifies = /^(verify|auto)/.test(stats.policy);
    $("rate").textContent = stats.tokens_per_second.toFixed(1);
    $("open").textContent = stats.texts_open;
    $("pages").textContent = `${stats.pages_used} of ${stats.pages_total}`;
    $("chat").disabled = !stats.has_chat;
    if (!stats.has_chat) $("chat").checked = false;
    $("depth-hint").textContent = verifies ? VERIFIED_HINT : EXIT_HINT;
    showHistogram(verifies ? stats.agreed : stats.exits);
    showPolicy(stats.policy);
  } catch (error) {
    $("state").textContent = error.message;
  }
}

async function keepRefreshing() {
  if (!document.hidden) await refresh();
  setTimeout(keepRefreshing, STATS_MS);
}

for (const [name] of POLICIES) addPolicy(name);
$("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!controller) generate();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    $("prompt-form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => controller?.abort());
$("policy").addEventListener("change", () => showThreshold());
$("policy-form").addEventListener("submit", (event) => {
  event.preventDefault();
  applyPolicy();
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  refresh();
});
keepRefreshing();
