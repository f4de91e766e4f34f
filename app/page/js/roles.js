() => {
  // Gradio labels its placeholders for pictures without a role, which screen readers may ignore
  // and a box with a copy button loses its label to the button, which comes first; pictures lie in buttons without a
  // name, the link around a download button is one more stop of the Tab key, and a message's head a button with another in it
  const name = () => {
    document.querySelectorAll(".empty[aria-label]:not([role])").forEach((empty) => empty.setAttribute("role", "img"));
    for (const picture of document.querySelectorAll(".image-container > button:not([aria-label])")) {
      const label = picture.closest(".block").querySelector("[data-testid=block-label]");
      picture.setAttribute("aria-label", label?.textContent.trim() || "Picture");
    }
    document.querySelectorAll("a[download]:has(> button)").forEach((link) => (link.tabIndex = -1));
    document.querySelectorAll(".toast-header[role=button]").forEach((head) => {
      head.removeAttribute("role");
      head.removeAttribute("tabindex");
    });
    for (const box of document.querySelectorAll("label :is(textarea, input[type=text]):not([aria-label])")) {
      const label = box.closest("label");
      if (label.control !== box) box.setAttribute("aria-label", label.querySelector("span").textContent.trim());
    }
  };
  // what cannot be undone is asked first, before Gradio sees the click
  const ask = (event) => {
    const button = event.target.closest?.(".asks");
    if (!button || confirm(`${button.textContent.trim()}? This cannot be undone.`)) return;
    event.preventDefault();
    event.stopImmediatePropagation();
  };
  window.addEventListener("click", ask, true);
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}
