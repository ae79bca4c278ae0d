// Draws every element of class tl-tokens: a circuitsvis component, with a choice of loop above where there are several.
// Its data is the JSON in the element (see LoopTokens in tokens.py); `CircuitsVis` comes with the bundle before.
(() => {
  let views = 0;

  function draw(root) {
    const { component, loops, props, start } = JSON.parse(root.querySelector("script").textContent);
    const holder = document.createElement("div");
    const target = () => {
      const element = document.createElement("div");
      element.id = `tl-tokens-${Date.now()}-${views++}`; // circuitsvis finds its element by id
      holder.replaceChildren(element);
      return element.id;
    };
    const show = (place) => CircuitsVis.render(target(), CircuitsVis[component], props[place]);
    if (props.length > 1) {
      const bar = document.createElement("div");
      bar.className = "tl-picker";
      bar.style.marginBottom = "8px";
      const label = document.createElement("label");
      label.textContent = "Loop ";
      const choice = document.createElement("input");
      Object.assign(choice, { type: "range", min: 0, max: props.length - 1, step: 1, value: start });
      const text = document.createElement("output");
      text.textContent = `${loops[start]}`;
      choice.addEventListener("input", () => {
        text.textContent = `${loops[choice.value]}`;
        show(choice.value);
      });
      label.append(choice, text);
      bar.append(label);
      root.append(bar);
    }
    root.append(holder);
    show(start);
  }

  for (const root of document.querySelectorAll(".tl-tokens:not([data-drawn])")) {
    root.dataset.drawn = "true";
    root.parentElement?.querySelector(":scope > .tl-still")?.remove();
    draw(root);
  }
})();
