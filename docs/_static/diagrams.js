/* Draws the page's diagrams, and again when the reader switches between light and dark. */
(() => {
  const root = document.documentElement;
  const sources = new Map();
  const draw = async () => {
    const dark = root.dataset.theme === "dark";
    window.mermaid.initialize({
      startOnLoad: false,
      securityLevel: "strict",
      theme: "base",
      fontFamily: getComputedStyle(document.body).fontFamily,
      flowchart: { curve: "basis", nodeSpacing: 28, rankSpacing: 34, useMaxWidth: true },
      themeVariables: dark
        ? { darkMode: true, background: "#121212", primaryColor: "#16324a", primaryTextColor: "#e8eef3",
            primaryBorderColor: "#56b4e9", lineColor: "#9fb3c1", edgeLabelBackground: "#1d262d" }
        : { primaryColor: "#e6f1f8", primaryTextColor: "#12222e", primaryBorderColor: "#0072b2",
            lineColor: "#5b6b77", edgeLabelBackground: "#ffffff" },
    });
    for (const node of document.querySelectorAll("pre.mermaid")) {
      if (!sources.has(node)) sources.set(node, node.textContent);
      node.textContent = sources.get(node);
      node.removeAttribute("data-processed");
    }
    try {
      await window.mermaid.run({ querySelector: "pre.mermaid" });
    } catch (error) {
      console.error(`A diagram on this page is not valid: ${error.message ?? error.str ?? JSON.stringify(error)}`);
    }
    for (const svg of document.querySelectorAll("pre.mermaid svg")) /* shrink a little, then scroll */
      svg.style.minWidth = `${0.62 * svg.viewBox.baseVal.width}px`;
  };
  let shown = root.dataset.theme;
  draw();
  new MutationObserver(() => {
    if (root.dataset.theme !== shown) { shown = root.dataset.theme; draw(); }
  }).observe(root, { attributes: true, attributeFilter: ["data-theme"] });
})();
