// Building and updating nodes. Values become text, never markup; a node is touched only when its value changed.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

export function el(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

export function say(node, text) {
  const value = String(text);
  if (node.textContent !== value) node.textContent = value;
}

export function set(node, name, value) {
  if (value === null || value === false || value === undefined) {
    if (node.hasAttribute(name)) node.removeAttribute(name);
  } else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

// Widths and the like go through the CSS object model: the page's policy allows no style attribute.
export function css(node, name, value) {
  if (node.style.getPropertyValue(name) !== value) node.style.setProperty(name, value);
}

// Keep `parent`'s children in step with `items`: made once by `make(item)`, told by `update(node, item)`, in order.
export function keyed(parent, items, key, make, update) {
  const known = parent.keyed || (parent.keyed = new Map());
  const wanted = new Set();
  let at = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    wanted.add(name);
    let node = known.get(name);
    if (!node) {
      node = make(item);
      known.set(name, node);
    }
    update(node, item);
    if (node === at) at = at.nextElementSibling;
    else parent.insertBefore(node, at);
  }
  for (const [name, node] of known) {
    if (!wanted.has(name)) {
      node.remove();
      known.delete(name);
    }
  }
}

// A card: heading, the unit or window of what is in it, and room for the content.
export function card(title, about, ...children) {
  const note = el("p", { class: "about", text: about || "" });
  const body = el("div", { class: "card-body" }, ...children);
  const node = el("section", { class: "card" }, el("header", {}, el("h2", { text: title }), note), body);
  return { node, note, body };
}

export function table(caption, columns) {
  const body = el("tbody");
  const head = el("tr", {}, columns.map((c) => el("th", { scope: "col", class: c.number ? "number" : null, text: c.name })));
  const node = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {}, el("caption", { class: "unseen", text: caption }), el("thead", {}, head), body));
  return { node, body };
}

export function chip(state, text) {
  return el("span", { class: "chip", "data-state": state, text: text || state });
}
