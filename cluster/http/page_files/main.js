// Ties the page together.

import { chosen, offer } from "./choice.js";
import { Cluster } from "./cluster.js";
import { Conversation } from "./conversation.js";
import { say, Turn } from "./log.js";
import { drawPlan, drawPyramid } from "./pyramid.js";
import { showReceipt } from "./receipt.js";
import { keepToken, Unreachable } from "./server.js";
import { Watch } from "./watch.js";

const at = (id) => document.getElementById(id);
const [log, composer, message, send, stop] = ["log", "composer", "message", "send", "stop"].map(at);

let conversation = new Conversation();
const cluster = new Cluster(at("cluster"));
const watch = new Watch(
  (state) => {
    at("model").textContent = state.model.split("/").at(-1);
    offer(at("policy"), state.policies);
    cluster.add(Date.now() / 1000, state);
    if (state.pipelines.length) showLink("serving", "good");
    else showLink("no pipeline yet", "waiting");
    at("token-form").hidden = true;
  },
  (error) => showTrouble(error),
);

function showLink(text, kind) {
  at("link").textContent = text;
  at("link").className = kind;
}

/** Shows that the server is away, or wants a token; other errors are for those to show who asked. */
function showTrouble(error) {
  if (error.status === 401) {
    at("token-form").hidden = false;
    at("token-problem").textContent = error.message;
    showLink("token wanted", "waiting");
  } else {
    showLink(error instanceof Unreachable ? "not reachable" : error.message, "bad");
  }
}

function showBusy(busy) {
  send.hidden = busy;
  stop.hidden = !busy;
}

async function ask() {
  const text = message.value;
  const turn = new Turn(log, text);
  const asked = conversation;
  message.value = "";
  showBusy(true);
  try {
    const receipt = await asked.say(
      text,
      chosen(composer),
      (piece) => turn.hear(piece),
      (tokens) => asked === conversation && drawPlan(at("pyramid"), tokens),
    );
    turn.end();
    drawPyramid(at("pyramid"), receipt.layers);
    showReceipt(at("receipt"), receipt);
  } catch (error) {
    if (error.name === "AbortError") turn.end("stopped");
    else turn.end(error.message, "problem");
    if (error.status === 401) showTrouble(error);
    // What nothing came of is there to be sent again.
    if (!turn.begun && !message.value && asked === conversation) message.value = text;
  } finally {
    if (asked === conversation) showBusy(false);
  }
}

async function renew() {
  const ended = conversation;
  conversation = new Conversation();
  showBusy(false);
  log.replaceChildren();
  at("pyramid").replaceChildren();
  at("receipt").replaceChildren();
  message.focus();
  try {
    await ended.end();
  } catch (error) {
    say(log, `The conversation before may still be held: ${error.message}`, "problem");
  }
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  if (!send.hidden) ask();
});
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!send.hidden) composer.requestSubmit();
});
stop.addEventListener("click", () => conversation.stop());
at("renew").addEventListener("click", renew);
at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(at("token").value);
  at("token").value = "";
  watch.ask();
});
watch.ask();
