// layer-settings.hpp - what ggml-vulkan uses of VK_EXT_layer_settings, for Vulkan headers that are older (Debian 12's)

#pragma once

#include <vulkan/vulkan_core.h>

#if VK_HEADER_VERSION < 272

    #include <vector>

namespace vk {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char * layer;
    const char * name;
    LayerSettingTypeEXT type;
    uint32_t n;
    const void * values;
};

struct LayerSettingsCreateInfoEXT {
    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings) :
        n((uint32_t) settings.size()), settings(settings.data()) {}

    VkStructureType type = (VkStructureType) 1000496000;
    const void * next = nullptr;
    uint32_t n;
    const LayerSettingEXT * settings;
};

} // namespace vk

#endif
