// The theme that was chosen here, before anything is painted. "auto" follows the system.
(function () {
  try {
    const chosen = localStorage.getItem("kvbank-theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch (_error) { /* storage is forbidden here: the system decides */ }
})();
