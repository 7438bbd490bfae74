// What the parts of the page share.

export const byId = (id) => document.getElementById(id);

// Writing what is there already would end a selection, and have a screen reader say it again.
export function setText(element, text) {
  if (element.textContent !== text) {
    element.textContent = text;
  }
}

export function show(element, visible) {
  element.hidden = !visible;
}

export function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// Bring the children of `parent` in line with `items`, in their order; a button that has the focus keeps it.
export function sync(parent, items, keyOf, create, update) {
  const focused = document.activeElement;
  const keys = new Set(items.map(keyOf));
  const kept = new Map();
  for (const child of [...parent.children]) {
    if (keys.has(child.dataset.key)) {
      kept.set(child.dataset.key, child);
    } else {
      child.remove();
    }
  }
  let next = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = kept.get(key);
    if (!child) {
      child = create(item);
      child.dataset.key = key;
    }
    update(child, item);
    if (child === next) {
      next = next.nextElementSibling;
    } else {
      parent.insertBefore(child, next);
    }
  }
  if (focused !== document.activeElement && parent.contains(focused)) {
    focused.focus({ preventScroll: true });
  }
}

export function since(seconds) {
  if (seconds < 90) {
    return `${Math.max(0, Math.round(seconds))} s`;
  }
  if (seconds < 5400) {
    return `${Math.round(seconds / 60)} min`;
  }
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

export function button(action, actions, id) {
  const made = make("button", "btn btn-sm btn-outline-secondary", action.label);
  made.type = "button";
  made.setAttribute("aria-label", `${action.label} ${id}`);
  made.addEventListener("click", () => actions.confirm(action, id));
  return made;
}
