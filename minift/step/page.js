(() => {
  "use strict";
  const root = document.documentElement;
  const stops = [...document.querySelectorAll(".stop")];
  const [back, next, slider, count, everything] =
    ["back", "next", "slider", "count", "everything"].map((id) => document.getElementById(id));
  let at = 0;

  const mark = (element, here) => element.classList.toggle("now", here);

  function show(index) {
    at = Math.max(0, Math.min(index, stops.length - 1));
    const stop = stops[at];
    const scene = stop.closest(".scene");
    document.querySelectorAll(".scene").forEach((other) => mark(other, other === scene));
    stops.forEach((other) => mark(other, other === stop));
    scene.querySelectorAll(".listing").forEach((listing) => {
      const here = listing.dataset.source === stop.dataset.source;
      mark(listing, here);
      listing.querySelectorAll(".line").forEach((line) => {
        const number = Number(line.dataset.line);
        mark(line, here && number >= Number(stop.dataset.first) && number <= Number(stop.dataset.last));
      });
    });
    scene.querySelectorAll(".equations li").forEach((line) => {
      const here = line.dataset.equation === stop.dataset.equation;
      mark(line, here);
      highlight(line.querySelector("span"), here ? stop.dataset.term : "");
    });
    slider.value = String(at);
    count.textContent = `${at + 1} / ${stops.length}`;
    back.disabled = at === 0;
    next.disabled = at === stops.length - 1;
    scrollToLine(scene.querySelector(".listing.now"));
    if (location.protocol !== "about:") history.replaceState(null, "", `#${at + 1}`); // in a notebook there is no address
  }

  function highlight(span, term) {
    const text = span.textContent;
    const start = term ? text.indexOf(term) : -1;
    if (start < 0) {
      span.textContent = text;
      return;
    }
    const found = document.createElement("mark");
    found.textContent = term;
    span.replaceChildren(text.slice(0, start), found, text.slice(start + term.length));
  }

  function scrollToLine(listing) {
    const pre = listing && listing.querySelector("pre");
    const line = pre && pre.querySelector(".line.now");
    if (line) pre.scrollTop = line.offsetTop - pre.offsetTop - pre.clientHeight / 2;
  }

  /** On a question, forward first means its answer. */
  function forward() {
    const closed = stops[at].matches(".question") && stops[at].querySelector("details:not([open])");
    if (closed) closed.open = true;
    else show(at + 1);
  }

  function toggle() {
    const all = root.classList.toggle("stepping") === false;
    everything.setAttribute("aria-pressed", String(all));
    if (!all) show(at);
  }

  back.addEventListener("click", () => show(at - 1));
  next.addEventListener("click", forward);
  slider.addEventListener("input", () => show(Number(slider.value)));
  everything.addEventListener("click", toggle);
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("summary, button, input") && event.key === " ") return;
    if (event.target === slider || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowRight" || event.key === " ") {
      event.preventDefault();
      forward();
      return;
    }
    const go = { ArrowLeft: at - 1, Home: 0, End: stops.length - 1 }[event.key];
    if (go === undefined) return;
    event.preventDefault();
    show(go);
  });

  if (!stops.length) return;
  document.querySelector("nav").hidden = false;
  slider.max = String(stops.length - 1);
  root.classList.add("stepping");
  const asked = Number(location.hash.slice(1));
  show(asked ? asked - 1 : 0);
})();
