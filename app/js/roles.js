() => {
  // Gradio labels its placeholders for pictures without a role, which screen readers may ignore
  const name = () =>
    document.querySelectorAll(".empty[aria-label]:not([role])").forEach((empty) => empty.setAttribute("role", "img"));
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}
