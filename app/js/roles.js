() => {
  // Gradio labels its placeholders for pictures without a role, which screen readers may ignore
  // and a box with a copy button loses its label to the button, which comes first
  const name = () => {
    document.querySelectorAll(".empty[aria-label]:not([role])").forEach((empty) => empty.setAttribute("role", "img"));
    for (const box of document.querySelectorAll("label :is(textarea, input[type=text]):not([aria-label])")) {
      const label = box.closest("label");
      if (label.control !== box) box.setAttribute("aria-label", label.querySelector("span").textContent.trim());
    }
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}
