// Draws every element of class tl-loop-attention: circuitsvis's AttentionHeads, with a choice of layer and loop above.
// Its data is the JSON in the element (see LoopAttention in attention.py), with attention in steps of 1/255, deflated;
// a layer is unpacked when it is looked at. `CircuitsVis` comes with the bundle before.
(() => {
  let views = 0;

  function make(tag, text, parent) {
    const element = document.createElement(tag);
    element.textContent = text; // never innerHTML: tokens are anybody's text
    parent.append(element);
    return element;
  }

  async function unpack(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // [head][query][key] of one loop, as numbers from 0 to 1.
  function patternOf(layer, place, size) {
    const entries = size * size;
    return Array.from({ length: layer.heads }, (_, head) =>
      Array.from({ length: size }, (_, query) => {
        const start = (place * layer.heads + head) * entries + query * size;
        return Array.from(layer.levels.subarray(start, start + size), (level) => level / 255);
      }),
    );
  }

  function draw(root) {
    const { tokens, layers, start, color } = JSON.parse(root.querySelector("script").textContent);
    const bar = make("div", "", root);
    bar.className = "tl-picker";
    bar.style.cssText = "display:flex; flex-wrap:wrap; gap:8px 28px; align-items:center; margin-bottom:8px";
    const layerLabel = make("label", "Layer ", bar);
    const layerChoice = make("select", "", layerLabel);
    for (const [index, layer] of layers.entries()) make("option", layer.name, layerChoice).value = index;
    layerChoice.value = start;
    const loopLabel = make("label", "Loop ", bar);
    const loopChoice = make("input", "", loopLabel);
    Object.assign(loopChoice, { type: "range", min: 0, step: 1 });
    const loopText = make("output", "", loopLabel);
    const holder = make("div", "", root);
    holder.className = "tl-heads";
    holder.style.maxWidth = "640px"; // else the picture is as wide as the page
    let head = 0; // the head that the reader clicked; it stays when the loop changes

    function thumbnails() {
      return [...holder.querySelectorAll("h4")].map((title) => title.parentElement.parentElement);
    }

    holder.addEventListener("click", (event) => {
      const clicked = thumbnails().findIndex((thumbnail) => thumbnail.contains(event.target));
      if (clicked >= 0) head = clicked;
    });

    async function show() {
      const layer = layers[layerChoice.value];
      layer.levels ??= await unpack(layer.pattern);
      if (layer !== layers[layerChoice.value]) return; // the reader has gone on
      const place = Number(loopChoice.value);
      const loop = layer.loops[place];
      loopChoice.disabled = layer.loops.length < 2;
      loopText.textContent = loop === null ? "runs once" : `${loop}`;
      const pattern = patternOf(layer, place, tokens.length);
      const target = document.createElement("div");
      target.id = `tl-heads-${Date.now()}-${views++}`; // circuitsvis finds its element by id
      holder.replaceChildren(target);
      if (head > 0 && head < pattern.length) {
        const watcher = new MutationObserver(() => {
          if (!thumbnails()[head]) return;
          watcher.disconnect();
          thumbnails()[head].click(); // circuitsvis starts at head 0
        });
        watcher.observe(target, { childList: true, subtree: true });
      }
      CircuitsVis.render(target.id, CircuitsVis.AttentionHeads, {
        attention: pattern,
        tokens,
        attentionHeadNames: pattern.map((_, index) => `Head ${index}`),
        positiveColor: color,
      });
    }

    function pickLayer() {
      loopChoice.max = layers[layerChoice.value].loops.length - 1;
      show();
    }

    layerChoice.addEventListener("change", pickLayer);
    loopChoice.addEventListener("input", show);
    loopChoice.value = 0;
    pickLayer();
  }

  for (const root of document.querySelectorAll(".tl-loop-attention:not([data-drawn])")) {
    root.dataset.drawn = "true";
    root.parentElement?.querySelector(":scope > .tl-still")?.remove();
    draw(root);
  }
})();
