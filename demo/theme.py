"""How the page looks, as far as Gradio's own components go; the rest is in page.css."""

from typing import Any

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Any:
    """Quiet paper, one blue. No font is loaded from anywhere."""
    from gradio.themes import Base, Color, sizes

    # From the palest to the darkest, as Gradio numbers them: 50, 100, 200 ... 950.
    blues = "eef5fb d8e8f6 b3d1ec 84b3de 4f91cb 2a72b3 0b4f8a 0a457a 093a66 072c4e 051e36"
    greys = "fafaf8 f3f2ef e6e4df d3d0c9 a5a29b 77756f 55534e 3a3936 262624 1a1a19 121211"
    blue, grey = (Color(*(f"#{shade}" for shade in row.split())) for row in (blues, greys))
    return Base(
        primary_hue=blue,
        secondary_hue=blue,
        neutral_hue=grey,
        radius_size=sizes.radius_md,
        spacing_size=sizes.spacing_md,
        text_size=sizes.text_md,
        font=_FONT,
        font_mono=_MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="#131416",
        body_text_color="#1f2328",
        body_text_color_dark="#e7e8ea",
        body_text_color_subdued="#5d6269",
        body_text_color_subdued_dark="#a2a7ae",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_weight="600",
        block_title_text_size="13px",
        block_info_text_size="12.5px",
        panel_background_fill="transparent",
        panel_background_fill_dark="transparent",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1c1e21",
        input_border_color="#d3d0c9",
        input_border_color_dark="#3a3e44",
        input_border_width="1px",
        input_shadow="none",
        border_color_primary="#e0ddd6",
        border_color_primary_dark="#303338",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_500",
        button_primary_background_fill_dark="#2a72b3",
        button_primary_background_fill_hover_dark="#3a83c5",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#f3f2ef",
        button_secondary_background_fill_dark="#24272b",
        button_secondary_background_fill_hover_dark="#2d3136",
        button_secondary_border_color="#d3d0c9",
        button_secondary_border_color_dark="#3a3e44",
        button_border_width="1px",
        checkbox_label_background_fill="#ffffff",
        checkbox_label_background_fill_dark="#1c1e21",
        checkbox_label_background_fill_selected="*primary_50",
        checkbox_label_background_fill_selected_dark="#173350",
        checkbox_label_border_color="#d3d0c9",
        checkbox_label_border_color_dark="#3a3e44",
        checkbox_label_border_color_selected="*primary_600",
        checkbox_label_border_color_selected_dark="#4f91cb",
        checkbox_label_text_color_selected="*primary_700",
        checkbox_label_text_color_selected_dark="#cfe3f6",
        checkbox_label_border_width="1px",
        slider_color="*primary_600",
        slider_color_dark="#4f91cb",
        layout_gap="14px",
    )
