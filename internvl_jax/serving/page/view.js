// Turns on the page.

/** An element with properties and children. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Answers may hold anything: what is left of their HTML can neither run nor load anything.
const SANITIZING = {
  FORBID_TAGS: ["img", "style", "form", "input", "button", "textarea", "select", "audio", "video", "svg", "math"],
  FORBID_ATTR: ["style", "id", "name", "class"],
  RETURN_DOM_FRAGMENT: true,
};

function rendered(markdown) {
  const fragment = DOMPurify.sanitize(marked.parse(markdown, { gfm: true, breaks: true }), SANITIZING);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  return fragment;
}

/** One turn of the conversation. */
export class TurnView {
  constructor(turn, { copy, retry }) {
    this.turn = turn;
    const images = turn.images.map((image) => element("img", { src: image.url, alt: image.name }));
    this.answer = element("div", { className: "answer" });
    this.error = element("p", { className: "error" });
    this.note = element("p", { className: "note" });
    this.copyButton = element("button", { type: "button", textContent: "Copy", onclick: () => copy(turn) });
    this.retryButton = element("button", { type: "button", textContent: "Retry", onclick: () => retry(turn) });
    this.root = element(
      "li", { className: "turn" },
      element("div", { className: "question" }, element("div", { className: "thumbnails" }, ...images), turn.question),
      this.answer, this.error,
      element("div", { className: "actions" }, this.copyButton, this.retryButton, this.note),
    );
  }

  /** Show the turn as it is now. */
  update(isLast) {
    const { answer, error, done, note } = this.turn;
    this.answer.replaceChildren(rendered(answer));
    this.answer.setAttribute("aria-busy", String(!done));
    this.error.textContent = error ?? "";
    this.error.hidden = !error;
    const left = done && !answer && !isLast ? "This question is left out of the conversation. " : "";
    this.note.textContent = left + (done ? (note ?? "") : answer ? "" : "Thinking …");
    this.copyButton.hidden = !done || !answer;
    this.retryButton.hidden = !done || !isLast;
  }
}
