"use strict";

// Parts of the page that change while it is open: server-sent events name an element and its new content. The HTML was
// escaped by the server. Nothing here is needed to read a page.
(() => {
  const main = document.querySelector("[data-live]");
  const filters = document.querySelectorAll("[data-filter]");

  function filter(input) {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of document.getElementById(input.dataset.filter).children) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  }

  function apply(parts) {
    for (const { id, mark, html } of parts) {
      const element = document.getElementById(id);
      if (!element || element.dataset.mark === mark) continue;
      const scrolled = element.querySelector(".log");
      const top = scrolled && scrolled.scrollTop;
      element.innerHTML = html;
      element.dataset.mark = mark;
      if (scrolled && element.querySelector(".log")) element.querySelector(".log").scrollTop = top;
    }
    filters.forEach(filter);
  }

  filters.forEach((input) => {
    input.addEventListener("input", () => filter(input));
    filter(input);
  });

  // A browser does not say why a stream was refused. The page itself leads to the login.
  async function leaveIfLoggedOut() {
    const asked = new AbortController();
    const answer = await fetch(main.dataset.live, { signal: asked.signal });
    asked.abort();
    if (answer.status === 401) window.location.reload();
  }

  if (main && window.EventSource) {
    const gone = document.getElementById("connection");
    const source = new EventSource(main.dataset.live);
    source.addEventListener("open", () => { gone.hidden = true; });
    source.addEventListener("error", () => {
      gone.hidden = false;
      if (source.readyState === EventSource.CLOSED) leaveIfLoggedOut();
    });
    source.addEventListener("message", (event) => apply(JSON.parse(event.data)));
    source.addEventListener("over", () => window.location.reload());
    window.addEventListener("pagehide", () => source.close());
  }
})();

// The page Try: sends the image, and shows what models say as they say it.
(() => {
  const form = document.querySelector("[data-try]");
  if (!form) return;
  const picked = document.getElementById("image");
  const chosen = document.getElementById("chosen");
  const spoken = document.getElementById("spoken");
  const button = form.querySelector("button");
  let image = "";

  picked.addEventListener("change", () => {
    const reader = new FileReader();
    reader.addEventListener("load", () => {
      image = reader.result;
      chosen.src = image;
      chosen.hidden = false;
    });
    if (picked.files[0]) reader.readAsDataURL(picked.files[0]);
  });

  async function ask(model) {
    const box = document.createElement("section");
    const title = document.createElement("h2");
    const text = document.createElement("p");
    title.textContent = model;
    text.className = "pre";
    box.append(title, text);
    spoken.append(box);
    const fields = { token: form.elements.token.value, model, question: form.elements.question.value, image };
    try {
      const response = await fetch(form.dataset.try, { method: "POST", body: new URLSearchParams(fields) });
      if (!response.ok) text.className = "pre fault";
      const reader = response.body.getReader();
      const decoder = new TextDecoder();
      for (let part = await reader.read(); !part.done; part = await reader.read()) {
        text.textContent += decoder.decode(part.value, { stream: true });
      }
      if (!text.textContent) text.textContent = "(nothing)";
    } catch (error) {
      text.className = "pre fault";
      text.textContent += ` (the answer broke off: ${error.message})`;
    }
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    spoken.textContent = "";
    button.disabled = true;
    const models = [form.elements.model.value, form.elements.second.value].filter(Boolean);
    await Promise.all(models.map(ask));
    button.disabled = false;
  });
})();
